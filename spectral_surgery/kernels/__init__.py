"""Loops compiled by numba when they are first called; beside each is a plain way to the same result."""
