"""What this repository's tests need beside the harness, which is a plugin of its own (tempo.harness.plugin)."""
