"""`ollm bench kv`: how fast keys and values come from this disk, against what the disk and memory can do.

`plan` says what will be measured and what cannot fit, `run` starts every case in a process of its own (`case`), which
uses `models`, `rates` and `memory`; `verdicts` compares, `table` and `plot` show. Knows the cache only through
`ollm.disk_cache` and `cache.state()`, as users do.
"""
