"""KV strategies for ollm that decide where on the disk a record goes: pages, large segments, a ring."""

from collections.abc import Iterable

import attrs

from ollm.plugin import (
    ByteSize,
    KVBuildContext,
    KVFacts,
    KVStore,
    StorageOptions,
    Strategy,
    hookimpl,
    option,
)

ollm_api_version = 1


def _positive(_: object, attribute: "attrs.Attribute[int]", value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{attribute.name}={value} is less than 1")


def _not_negative(_: object, attribute: "attrs.Attribute[int]", value: int) -> None:
    if value < 0:
        raise ValueError(f"{attribute.name}={value} is negative")


@attrs.frozen(kw_only=True)
class PagedOptions(StorageOptions):
    """Options of `paged`."""

    page_tokens: int | None = option(
        None,
        help="Tokens of a page. Default: a power of two that makes pages of at most 2 MiB for one row.",
        validator=_positive,
    )


@attrs.frozen(kw_only=True)
class SegmentedOptions(StorageOptions):
    """Options of `streamed-segmented`."""

    segment_bytes: ByteSize = option(
        ByteSize(256 * 2**20),
        help="A file that has reached this size is followed by another.",
        validator=_positive,
        changes_format=False,
    )


@attrs.frozen(kw_only=True)
class RingOptions(StorageOptions):
    """Options of `sliding-window-ring-buffer`."""

    sink_tokens: int = option(
        0, help="First tokens that stay visible for ever (attention sinks).", validator=_not_negative
    )
    slot_tokens: int | None = option(
        None,
        help="Tokens of a slot, which are evicted together. Default: a sixteenth of the window, at most 256.",
        validator=_positive,
    )


@hookimpl
def ollm_kv_stores() -> Iterable[Strategy[KVStore]]:
    yield Strategy(
        name="paged",
        summary="Fixed-size pages in one pool, with a page table per layer: freed pages are used again.",
        build=_build_paged,
        options=PagedOptions,
        facts=KVFacts(
            lossless=True,
            directory="kv_cache_paged",
            downsides="A page that is not full takes the space of a full one; up to a page per layer waits in memory.",
        ),
    )
    yield Strategy(
        name="streamed-segmented",
        summary="All layers in large sequential files, in the order in which they were written.",
        build=_build_segmented,
        options=SegmentedOptions,
        facts=KVFacts(
            lossless=True,
            directory="kv_cache_streamed_segmented",
            downsides="Space of cropped tokens comes back from the end of a file, or when all of a file was dropped.",
        ),
    )
    yield Strategy(
        name="sliding-window-ring-buffer",
        summary="The newest cache_window_tokens only, in a ring of slots; the oldest are dropped.",
        build=_build_ring,
        options=RingOptions,
        facts=KVFacts(
            lossless=True,
            full_history=False,
            directory="kv_cache_sliding_window_ring_buffer",
            downsides="The model forgets what is older than the window; a prompt's piece is stored whole before that.",
        ),
    )


def _build_paged(context: KVBuildContext) -> KVStore:
    from ollm_kv_paged.paged import PagedStore, default_page_tokens

    page_tokens = context.options.page_tokens or default_page_tokens(context.geometry)
    return PagedStore(context.storage(), page_tokens=page_tokens)


def _build_segmented(context: KVBuildContext) -> KVStore:
    from ollm_kv_paged.segmented import SegmentedFilesStore

    return SegmentedFilesStore(context.storage(), segment_bytes=context.options.segment_bytes)


def _build_ring(context: KVBuildContext) -> KVStore:
    from ollm_kv_paged.ring import RingStore

    assert context.window_tokens is not None  # core asks for it: full_history=False
    options = context.options
    return RingStore(
        context.storage(), window=context.window_tokens, sinks=options.sink_tokens, slot_tokens=options.slot_tokens
    )
