"""Measured comparisons, run by hand: `make conformance`."""
