"""Post-training of checkpoints in Hugging Face's format on problems with checkable answers."""
