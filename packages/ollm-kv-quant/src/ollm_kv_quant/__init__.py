"""KV strategy for ollm: keys and values that have left the tail, in fewer bits."""

from collections.abc import Iterable

import attrs

from ollm.plugin import KVBuildContext, KVFacts, KVStore, StorageOptions, Strategy, hookimpl, option

ollm_api_version = 1

REPRESENTATIONS = ("int8-symmetric-per-tensor", "int8-per-token", "int4-per-token-group")


def _known(_: object, attribute: "attrs.Attribute[str]", value: str) -> None:
    if value not in REPRESENTATIONS:
        raise ValueError(f"{attribute.name}={value!r} is none of {', '.join(REPRESENTATIONS)}")


@attrs.frozen(kw_only=True)
class QuantizedOptions(StorageOptions):
    """Options of `quantized-cold-tier`."""

    representation: str = option(
        REPRESENTATIONS[0],
        help=f"How keys and values are encoded: {', '.join(REPRESENTATIONS)}.",
        validator=_known,
    )


@hookimpl
def ollm_kv_stores() -> Iterable[Strategy[KVStore]]:
    yield Strategy(
        name="quantized-cold-tier",
        summary="What leaves the tail as int8 (or int4) with explicit scales: half the bytes or less.",
        build=_build_quantized,
        options=QuantizedOptions,
        facts=KVFacts(
            lossless=False,
            directory="kv_cache_quantized_cold_tier",
            downsides="Keys and values are rounded, so that answers may differ; NaN and infinity are refused.",
        ),
    )


def _build_quantized(context: KVBuildContext) -> KVStore:
    from ollm_kv_quant.codecs import codec
    from ollm_kv_quant.store import QuantizedStore

    chosen = codec(context.options.representation)
    for layer in context.geometry.layers:
        chosen.check(layer.key_size)
        chosen.check(layer.value_size)
    return QuantizedStore(context.storage(), chosen)
