"""The plugin that ships in `ollm-core`: what works without installing anything else.

Registered through core's own entry point and written against `ollm.plugin` alone, exactly like a third party's.
"""

from collections.abc import Iterable

from ollm.plugin import (
    BuildContext,
    KVBuildContext,
    KVFacts,
    KVStore,
    ModelAdapter,
    OffloadPlacement,
    SpillPolicy,
    StorageOptions,
    Strategy,
    hookimpl,
)

ollm_api_version = 1


@hookimpl
def ollm_kv_stores() -> Iterable[Strategy[KVStore]]:
    yield Strategy(
        name="resident",
        summary="Everything in memory: the baseline, for contexts that fit.",
        build=_build_resident,
        facts=KVFacts(lossless=True, directory=None, downsides="Memory grows with the context."),
    )
    yield Strategy(
        name="chunked",
        summary="One append-only file per layer, chunks of any size: the simple default.",
        build=_build_chunked,
        options=StorageOptions,
        facts=KVFacts(
            lossless=True,
            directory="kv_cache_chunked",
            downsides="Space of cropped tokens comes back only from the end of a file.",
        ),
    )


@hookimpl
def ollm_spill_policies() -> Iterable[Strategy[SpillPolicy]]:
    yield Strategy(
        name="auto",
        summary="Flush early, keep resident what a part of the free memory holds.",
        build=_build_auto,
    )


@hookimpl
def ollm_offload_placements() -> Iterable[Strategy[OffloadPlacement]]:
    yield Strategy(name="fit", summary="As many layers as memory takes, spread evenly: the default.", build=_build_fit)


@hookimpl
def ollm_model_adapters() -> Iterable[Strategy[ModelAdapter]]:
    yield Strategy(name="llama", summary="Llama and models built like it.", build=_build_llama)
    yield Strategy(name="generic", summary="Any model whose decoder holds one list of layers.", build=_build_generic)


def _build_resident(context: KVBuildContext) -> KVStore:
    from ollm.builtin.resident import ResidentStore

    return ResidentStore()


def _build_chunked(context: KVBuildContext) -> KVStore:
    from ollm.builtin.chunked import ChunkedStore

    return ChunkedStore(context.storage())


def _build_auto(context: BuildContext) -> SpillPolicy:
    from ollm.builtin.spill import AutoSpill

    return AutoSpill()


def _build_fit(context: BuildContext) -> OffloadPlacement:
    from ollm.builtin.fit import Fit

    return Fit()


def _build_llama(context: BuildContext) -> ModelAdapter:
    from ollm.builtin.adapters import LlamaAdapter

    return LlamaAdapter()


def _build_generic(context: BuildContext) -> ModelAdapter:
    from ollm.builtin.adapters import GenericAdapter

    return GenericAdapter()
