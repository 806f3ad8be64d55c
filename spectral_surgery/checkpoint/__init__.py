"""Checkpoint files: headers, bytes, manifests and work lists; nothing here builds a module."""
