"""Files of checkpoints: headers, bytes, whole folders; nothing here builds a module."""
