"""Makes checkpoints from others: joins a decoder and a tower, adds image tokens, makes and applies deltas."""
