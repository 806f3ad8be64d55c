"""Training: adapters, models from nothing, and the loop that heals compressed ones."""
