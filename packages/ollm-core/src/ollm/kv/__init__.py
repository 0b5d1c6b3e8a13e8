"""The engine: one cache's history of keys and values, over any store.

`history` is one layer: `tail` holds what is not yet a full extent, `rows` maps the batch of today onto the batches of
the past, `handle` stands for all of it in block mode. `session` joins store, plan and counters; `pins` knows who still
reads what was dropped. `source` gives the stored blocks back: some stay in memory (`residency`), the rest is read ahead
(`reader`) and, for an accelerator, copied there (`staging`). Pure torch: nothing here knows transformers, models or any
particular store.
"""
