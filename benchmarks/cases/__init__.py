"""One file per group of benchmark cases."""
