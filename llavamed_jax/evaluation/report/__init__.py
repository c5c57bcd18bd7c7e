"""Reporting: the page, the summary in a terminal, and TensorBoard's scalars."""
