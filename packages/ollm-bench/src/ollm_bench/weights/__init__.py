"""`ollm bench weights`: forwards whose weights come from the disk, and transformers' ways of doing the same."""
