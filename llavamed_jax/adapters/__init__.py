"""Adapters: low-rank factors beside kernels, PEFT's files, merging."""
