"""Model surgery and checkpoint compression in the frequency domain."""
