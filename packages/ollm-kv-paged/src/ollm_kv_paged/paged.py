"""`paged`: pages of a fixed number of tokens, in slots of a pool that all layers share.

Core's table says which page holds which tokens; where a page lies says which slot it is in. A page that is not full is
never grown in place: core writes a fuller one, which goes to another slot, and frees it. Paging keys and values is
vLLM's idea (Kwon et al., 2023); here the pages lie on disk.
"""

from __future__ import annotations

from ollm.plugin import KVGeometry, Storage
from ollm_kv_paged.slots import Pool, SlottedStore

_PAGE_BYTES = 2 * 2**20
_MOST_PAGE_TOKENS = 4096


def default_page_tokens(geometry: KVGeometry) -> int:
    """The largest power of two whose pages take at most 2 MiB in every layer, for one row."""
    token_bytes = max((layer.bytes_per_token for layer in geometry.layers), default=1)
    tokens = min(max(_PAGE_BYTES // token_bytes, 1), _MOST_PAGE_TOKENS)
    return 1 << (tokens.bit_length() - 1)


class PagedStore(SlottedStore):
    """One pool, which is one file, for pages of one size."""

    def __init__(self, storage: Storage, *, page_tokens: int) -> None:
        super().__init__(storage, slot_tokens=page_tokens, make_slots=Pool, shares=lambda key: None)
