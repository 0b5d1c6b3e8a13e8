"""`sliding-window-ring-buffer`: the newest tokens only, in a ring of slots per layer.

The window and the sinks are declared; core masks by position, so that a query sees exactly the window, and evicts slots
that no query will see again. First tokens as sinks: StreamingLLM (Xiao et al., 2024); here they keep their positions.
"""

from __future__ import annotations

from ollm.plugin import Storage
from ollm_kv_paged.slots import Ring, SlottedStore

_MOST_SLOT_TOKENS = 256


class RingStore(SlottedStore):
    """One ring, which is one file, per layer, branch and number of rows."""

    def __init__(self, storage: Storage, *, window: int, sinks: int, slot_tokens: int | None) -> None:
        size = slot_tokens or min(max(window // 16, 1), _MOST_SLOT_TOKENS)
        super().__init__(storage, slot_tokens=size, make_slots=Ring, shares=lambda key: (key.layer, key.branch))
        self.window, self.sinks = window, sinks
