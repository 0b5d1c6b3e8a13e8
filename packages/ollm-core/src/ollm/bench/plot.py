"""The outcomes as a picture. Needs matplotlib, from the extra `plot`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ollm.bench.records import Geometry, Outcome
from ollm.bench.verdicts import judge
from ollm.errors import MissingExtraError


def check_plot() -> None:
    """Whether a plot can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("--plot needs matplotlib: pip install 'ollm-core[plot]'")


def plot(outcomes: Sequence[Outcome], geometry: Geometry, machine: dict[str, Any], file: Path) -> None:
    """Seconds per token of every case that was measured, with what was possible, as a PNG."""
    from matplotlib.figure import Figure

    judged = [(outcome, judge(outcome, outcomes)) for outcome in outcomes]
    shown = [(outcome, verdict) for outcome, verdict in judged if verdict is not None]
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, (outcome, verdict) in enumerate(shown):
        color = "tab:blue" if outcome.case.on_disk else "tab:gray"
        axes.barh(place, verdict.seconds, color=color, height=0.6)
        axes.annotate(
            f" {verdict.seconds:.2f} s, {verdict.peak / 1e6:,.0f} MB", (verdict.seconds, place), va="center", fontsize=9
        )
        if verdict.possible:
            axes.plot([verdict.possible] * 2, [place - 0.38, place + 0.38], color="tab:orange", linewidth=2.5)
    axes.plot([], [], color="tab:orange", linewidth=2.5, label="possible: the larger of reading and computing")
    lengths = {outcome.case.tokens for outcome, _ in shown}
    axes.set_yticks(
        range(len(shown)),
        [outcome.case.title + (f", {outcome.case.tokens:,}" if len(lengths) > 1 else "") for outcome, _ in shown],
    )
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds per token; memory above the model")
    axes.spines[["top", "right"]].set_visible(False)
    tokens = ", ".join(f"{length:,}" for length in sorted(lengths))
    axes.set_title(
        f"Decoding at {tokens} tokens: {geometry.layers} layers, {geometry.kv_heads} KV heads of {geometry.head_dim}, "
        f"{geometry.dtype}\n{machine['processor']}, {machine['cores']} cores, {machine['file_system']}, "
        f"{machine['date'][:10]}",
        fontsize=10, loc="left",
    )  # fmt: skip
    if shown:
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)
