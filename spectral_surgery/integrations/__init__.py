"""Plug-ins of other libraries: adapter methods for PEFT."""
