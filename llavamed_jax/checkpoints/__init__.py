"""Reads and writes checkpoints of every layout, under one table of tensor names."""
