"""The harness's pytest plugins: options and evidence, then what a session shows."""

pytest_plugins = ["fixtures.session", "fixtures.regression", "fixtures.report"]
