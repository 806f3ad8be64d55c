"""Computing with spectra: one folder for each operation, a plain reference in each."""
