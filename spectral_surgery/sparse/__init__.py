"""Sparse spectral tensors: a tensor as its largest spectral coefficients."""
