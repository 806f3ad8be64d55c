"""Text to calibrate, train and judge on."""
