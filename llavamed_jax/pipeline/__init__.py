"""Batches for training: records are tokenised, packed into rows and made ahead in worker processes."""
