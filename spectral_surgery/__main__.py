"""``python -m spectral_surgery``: the same as the command ``spectral-surgery``."""

from spectral_surgery.cli import main

if __name__ == "__main__":
    main()
