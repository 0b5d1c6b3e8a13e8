"""The engine: one cache's history of keys and values, over any store.

`table` knows which tokens are where, for a cache and its forks. `history` is one layer of a cache: `tail` holds what is
not yet an extent, `writer` makes extents of it, `handle` stands for all of it in block mode. `source` gives the stored
blocks back, in an order that `route` works out: some stay in memory (`residency`, `encoded`), the rest is read ahead
(`reader`), or in parts (`parts`). `selection` says which of them a query attends to. `session` joins all that over one
store. Pure torch: nothing here knows transformers, models or any particular store.
"""
