"""Plug-ins of transformers and PEFT, and what is read from their models."""
