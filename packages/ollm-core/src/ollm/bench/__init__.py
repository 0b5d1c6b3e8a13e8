"""`ollm bench`: measures ollm against what disk and memory of this machine can do, each case in its own process.

`kv` measures caches and `weights` models whose layers are read from the disk; what is here beside them serves both. It
uses ollm as a user does and knows nothing of the engine's insides.
"""
