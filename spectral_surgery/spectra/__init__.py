"""One matrix as few, cheap coefficients: sparse and quantised spectra, how to choose them and how to store them."""
