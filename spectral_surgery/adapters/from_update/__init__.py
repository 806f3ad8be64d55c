"""Weight updates into adapters."""
