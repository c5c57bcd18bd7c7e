"""Attention with several backends: XLA, flash attention for GPUs, and splash attention for TPUs."""
