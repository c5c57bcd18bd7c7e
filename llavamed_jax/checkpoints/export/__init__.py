"""Exports checkpoints in the PyTorch layouts, with tokenizer, processor, chat template and model card."""
