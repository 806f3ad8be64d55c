"""Loops compiled by numba when they are first called; beside each is a plain way to the same result."""

BLOCK = 32  # rows of a column that are rounded and coded together
