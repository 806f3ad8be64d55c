"""What the layers of a model are given on some text, one block in memory at a time."""
