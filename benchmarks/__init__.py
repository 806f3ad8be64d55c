"""Benchmarks that check before they time, and the baselines a compression must be held against."""
