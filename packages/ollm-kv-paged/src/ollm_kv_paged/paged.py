"""`paged`: pages of a fixed number of tokens, in slots of a pool that all layers share.

The table of a layer says which slot holds which tokens. A page that is not full is never grown in place: core writes a
fuller one, which goes to another slot, and frees it. Paging keys and values is vLLM's idea (Kwon et al.,
2023); here the pages lie on disk.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from ollm.plugin import Extent, KVGeometry, Storage
from ollm_kv_paged.slots import Pool, SlottedStore

_PAGE_BYTES = 2 * 2**20
_MOST_PAGE_TOKENS = 4096


def default_page_tokens(geometry: KVGeometry) -> int:
    """The largest power of two whose pages take at most 2 MiB in every layer, for one row."""
    token_bytes = max((layer.bytes_per_token for layer in geometry.layers), default=1)
    tokens = min(max(_PAGE_BYTES // token_bytes, 1), _MOST_PAGE_TOKENS)
    return 1 << (tokens.bit_length() - 1)


@attrs.frozen
class Page:
    """One line of a page table: tokens `start … stop - 1` of a layer lie in a slot of a pool."""

    start: int
    stop: int
    pool: int
    slot: int


class PagedStore(SlottedStore):
    """One pool, which is one file, for pages of one size."""

    def __init__(self, storage: Storage, *, page_tokens: int) -> None:
        super().__init__(storage, slot_tokens=page_tokens, make_slots=Pool, shares=lambda key: None)

    def page_table(self, extents: Iterable[Extent]) -> tuple[Page, ...]:
        """The extents of a layer as pages, in order of position."""
        return tuple(
            Page(extent.start, extent.stop, extent.location.segment, self.slot(extent.location)) for extent in extents
        )
