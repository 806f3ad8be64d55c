"""What each command does, as a plain function: one room for each command.

What they have in common is said here once. ``out`` is a folder, or a file, that appears whole at the end or not at all;
``overwrite`` replaces one that is there. ``progress`` is called as the work advances. ``origin`` is the Hub repository
that the source is a copy of, for the model card. Reports have ``seconds`` of wall time and ``peak_rss_bytes``, the
largest resident size of the process; ``to_json`` gives their plain values.
"""
