"""Offload placements for ollm: which decoder layers stay close when not all of them can.

`prefix`, `suffix`, `middle-band`, and `auto`, which stands for `middle-band`.
"""

from collections.abc import Iterable

from ollm.plugin import BuildContext, OffloadPlacement, Strategy, hookimpl

ollm_api_version = 1


@hookimpl
def ollm_offload_placements() -> Iterable[Strategy[OffloadPlacement]]:
    yield Strategy(name="prefix", summary="The first layers.", build=_build_prefix)
    yield Strategy(name="suffix", summary="The last layers.", build=_build_suffix)
    yield Strategy(name="middle-band", summary="Consecutive layers around the middle.", build=_build_middle_band)
    yield Strategy(name="auto", summary="The placement that ollm recommends: middle-band.", build=_build_auto)


def _build_prefix(context: BuildContext) -> OffloadPlacement:
    from ollm_offload.bands import Prefix

    return Prefix()


def _build_suffix(context: BuildContext) -> OffloadPlacement:
    from ollm_offload.bands import Suffix

    return Suffix()


def _build_middle_band(context: BuildContext) -> OffloadPlacement:
    from ollm_offload.bands import MiddleBand

    return MiddleBand()


def _build_auto(context: BuildContext) -> OffloadPlacement:
    from ollm_offload.bands import Auto

    return Auto()
