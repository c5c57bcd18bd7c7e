"""What every room may use: the standard library and nothing above it."""
