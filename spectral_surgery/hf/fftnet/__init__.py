"""FFTNet as models of transformers."""
