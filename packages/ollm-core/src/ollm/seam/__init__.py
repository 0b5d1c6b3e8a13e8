"""Everything that depends on transformers, and nothing else does: its cache classes, its configs, its loaders.

Written against transformers 5.17 – 5.23. `layers` has the cache layers, `cache` the `KVCache`, `geometry` reads
configs, `loading` reads checkpoints. Knows nothing of stores, folders or plugins.
"""

from transformers import TextStreamer

__all__ = ["TextStreamer"]
