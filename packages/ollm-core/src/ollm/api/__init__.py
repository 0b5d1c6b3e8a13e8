"""What people call. Measures, asks `ollm.plan` what to do, and does it: opens caches, loads models, places layers.

`cache` has `disk_cache`, `opening` carries a cache's plan out, `facts` finds out what a plan must know of a model,
`inference` holds a model with what belongs to it, `placement` moves its layers. `signature` gives functions the
arguments of a request.
"""
