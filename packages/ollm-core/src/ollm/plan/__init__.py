"""Decides, and does nothing else: from a request, a model's facts and measured memory to a plan that can be printed.

`request` is what a user may ask for and `settings` where that may be written down; `facts` is what is known of a
model; `checks` says what fits together; `cache` makes the plan of a cache, `placement` that of a model's layers, and
`prompts` says how long a prompt may be. Opens nothing, allocates nothing, runs nothing, imports no torch: what a plan
says is carried out by `ollm.api`.
"""

from ollm.plan.cache import CachePlan, plan_cache
from ollm.plan.facts import BlockVerdict, ModelFacts
from ollm.plan.request import CacheRequest

__all__ = ["BlockVerdict", "CachePlan", "CacheRequest", "ModelFacts", "plan_cache"]
