"""What moves bytes: system calls, files, aligned buffers, worker threads per disk, device rings; and what memory there is.

Knows nothing of files, formats, keys or values.
"""
