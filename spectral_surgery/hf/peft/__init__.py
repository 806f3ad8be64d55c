"""The adapter methods of this package as methods of PEFT."""
