"""KV strategies for ollm over append-only journals, and the spill policy that keeps a hot tail."""

from collections.abc import Iterable

import attrs

from ollm.plugin import (
    BuildContext,
    KVBuildContext,
    KVFacts,
    KVStore,
    SpillPolicy,
    StorageOptions,
    Strategy,
    hookimpl,
    option,
)

ollm_api_version = 1


def _at_least(least: int) -> object:
    def check(_: object, attribute: "attrs.Attribute[int]", value: int) -> None:
        if value < least:
            raise ValueError(f"{attribute.name}={value} is less than {least}")

    return check


@attrs.frozen(kw_only=True)
class JournalOptions(StorageOptions):
    """Options of `log-structured-journal`."""

    compaction_entries: int = option(
        64,
        help="A journal's table that has so many entries is compacted: those that are contiguous become one.",
        validator=_at_least(2),
        changes_format=False,
    )


@attrs.frozen(kw_only=True)
class TieredOptions(JournalOptions):
    """Options of `tiered-write-back`."""

    write_buffers: int = option(
        8,
        help="Records of up to 8 MiB that may wait to be written; then appending waits.",
        validator=_at_least(1),
        changes_format=False,
    )


@hookimpl
def ollm_kv_stores() -> Iterable[Strategy[KVStore]]:
    yield Strategy(
        name="log-structured-journal",
        summary="One append-only journal of self-describing frames per layer, with a compacted table.",
        build=_build_journal,
        options=JournalOptions,
        facts=KVFacts(
            lossless=True,
            directory="kv_cache_log_structured_journal",
            downsides="Space of cropped tokens comes back only from the end of a journal.",
        ),
    )
    yield Strategy(
        name="tiered-write-back",
        summary="The newest tokens in memory, older ones written behind to a journal: bursts do not wait for the disk.",
        build=_build_tiered,
        options=TieredOptions,
        facts=KVFacts(
            lossless=True,
            directory="kv_cache_tiered_write_back",
            spill_policy="hot-tail",
            downsides="Takes more memory: the hot tail, and up to write_buffers records that wait for the disk.",
        ),
    )


@hookimpl
def ollm_spill_policies() -> Iterable[Strategy[SpillPolicy]]:
    yield Strategy(
        name="hot-tail",
        summary="As auto, but the newest 128 tokens (64 on an accelerator) stay in memory after a flush.",
        build=_build_hot_tail,
    )


def _build_journal(context: KVBuildContext) -> KVStore:
    from ollm_kv_journal.journal import JournalStore

    return JournalStore(context.storage(compact_from=context.options.compaction_entries))


def _build_tiered(context: KVBuildContext) -> KVStore:
    from ollm_kv_journal.journal import JournalStore

    options = context.options
    storage = context.storage(write_buffers=options.write_buffers, compact_from=options.compaction_entries)
    return JournalStore(storage)


def _build_hot_tail(context: BuildContext) -> SpillPolicy:
    from ollm_kv_journal.spill import HotTail

    return HotTail()
