"""Kernels of few bits: their arrays, rounding, and product."""
