"""What plugins promise and what core promises them. Contracts only: no I/O, no torch at import, no policy."""
