"""Loops compiled by numba when they are first called; beside each is a plain way to the same result."""

BLOCK = 32  # rows of a column that are rounded and coded together
SHORT = 128  # added to the number of lanes of a frame where states have 32 bits, and words 16
