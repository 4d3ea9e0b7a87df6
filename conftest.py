"""The harness is a plugin of its own (tempo.harness.plugin); its tests run pytest within pytest."""

pytest_plugins = ["pytester"]
