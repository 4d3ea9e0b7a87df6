"""Tests of the library and of the harness, and what they share."""
