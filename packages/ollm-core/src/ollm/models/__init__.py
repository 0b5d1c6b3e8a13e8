"""From what a user calls a model to a directory that can be loaded. Reads names and small files, loads no weights."""
