"""What all reading and writing of large data shares: worker threads, one set per disk, and aligned reusable buffers.

Knows nothing of files, formats, keys or values.
"""
