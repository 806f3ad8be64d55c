"""Compressed folders in transformers: loading, running, saving."""
