"""Text generation on one engine: jitted prefill and decode programs, a KV cache of rows, sampling and beam search."""
