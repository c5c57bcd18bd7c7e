"""The model in flax.linen: vision towers, projector, decoders and attention, and LLaVA, which joins them."""
