"""What each command does, as plain functions: one file per command."""
