"""From findings and traces to what a reader opens."""
