"""Reports results as an HTML page, a summary for the terminal, and scalars for TensorBoard."""
