"""What models are run on to calibrate and heal them: text, and what is not text."""
