"""Reads and writes the weight files of PyTorch, and matches their tensors with canonical names."""
