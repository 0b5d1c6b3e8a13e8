"""The engine: one cache's history of keys and values, over any store.

`tail` holds what is not yet a full extent, `rows` maps the batch of today onto the batches of the past, `residency`
keeps some extents in memory, `session` joins store, plan and counters, `history` is one layer. Pure torch: nothing here
knows transformers, models or any particular store.
"""
