"""Offload placements and spill policies for ollm: what stays close when not everything can.

Placements of decoder layers: `prefix`, `suffix`, `middle-band`, `interleaved`, and `auto`, which stands for
`middle-band`. Spill
policies of keys and values: `write-through` and `fixed-budget`.
"""

from collections.abc import Iterable

from ollm.plugin import BuildContext, OffloadPlacement, SpillPolicy, Strategy, hookimpl

ollm_api_version = 1


@hookimpl
def ollm_offload_placements() -> Iterable[Strategy[OffloadPlacement]]:
    yield Strategy(name="prefix", summary="The first layers.", build=_build_prefix)
    yield Strategy(name="suffix", summary="The last layers.", build=_build_suffix)
    yield Strategy(name="middle-band", summary="Consecutive layers around the middle.", build=_build_middle_band)
    yield Strategy(
        name="interleaved",
        summary="Layers spread evenly: the others are read while these compute.",
        build=_build_interleaved,
    )
    yield Strategy(name="auto", summary="The placement that ollm recommends: middle-band.", build=_build_auto)


@hookimpl
def ollm_spill_policies() -> Iterable[Strategy[SpillPolicy]]:
    yield Strategy(
        name="write-through",
        summary="Flush every 16 tokens: next to nothing is in memory only.",
        build=_build_write_through,
    )
    yield Strategy(
        name="fixed-budget",
        summary="Keep 256 MiB or ram_budget resident, the same on every machine.",
        build=_build_fixed_budget,
    )


def _build_prefix(context: BuildContext) -> OffloadPlacement:
    from ollm_offload.bands import Prefix

    return Prefix()


def _build_suffix(context: BuildContext) -> OffloadPlacement:
    from ollm_offload.bands import Suffix

    return Suffix()


def _build_middle_band(context: BuildContext) -> OffloadPlacement:
    from ollm_offload.bands import MiddleBand

    return MiddleBand()


def _build_interleaved(context: BuildContext) -> OffloadPlacement:
    from ollm_offload.bands import Interleaved

    return Interleaved()


def _build_auto(context: BuildContext) -> OffloadPlacement:
    from ollm_offload.bands import Auto

    return Auto()


def _build_write_through(context: BuildContext) -> SpillPolicy:
    from ollm_offload.spill import WriteThrough

    return WriteThrough()


def _build_fixed_budget(context: BuildContext) -> SpillPolicy:
    from ollm_offload.spill import FixedBudget

    return FixedBudget()
