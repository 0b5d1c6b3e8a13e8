"""What moves bytes: system calls, files, buffers, the worker threads of a disk, rings to a device, the memory ledger.

Knows nothing of records, checkpoints, keys or values.
"""
