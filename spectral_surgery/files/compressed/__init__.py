"""Compressed checkpoints on disk: plan, parts, manifest, and the way back."""
