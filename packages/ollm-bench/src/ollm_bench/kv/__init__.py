"""`ollm bench kv`: decoding with each KV strategy, and with transformers' caches in memory."""
