"""Model cards of the folders that commands write."""
