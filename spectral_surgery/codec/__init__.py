"""The stored form of a matrix: transform, quantise, code, and the way back."""
