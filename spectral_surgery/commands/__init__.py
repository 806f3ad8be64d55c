"""What each command does, as a plain function: one room for each command."""
