"""`ollm bench`: measures caches against what disk and memory of this machine can do, each case in its own process.

It uses ollm as a user does, through `disk_cache`, and knows nothing of the engine's insides.
"""
