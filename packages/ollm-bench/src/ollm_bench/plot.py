"""A report as a picture. Knows matplotlib, which is imported only here and only when a picture is wanted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ollm.plugin import MissingExtraError
from ollm_bench.table import AnyOutcome, AnyReport, Wording

_BASELINE, _ON_DISK, _MARK = "0.65", "tab:blue", "black"


def check_matplotlib() -> None:
    """Raise before any work begins rather than after it.

    Raises:
        MissingExtraError: when matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError('--plot draws with matplotlib, which is not installed: pip install "ollm-bench[plot]"')


def draw(report: AnyReport, wording: Wording, path: Path) -> None:
    """Seconds per step of every case that finished, with what was possible and the memory it took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [outcome for outcome in report.outcomes if outcome.case.is_step and _seconds(outcome)]
    figure, axes = pyplot.subplots(figsize=(10, 1.8 + 0.45 * max(len(done), 1)), layout="constrained")
    names = [outcome.case.title for outcome in done]
    seconds = [_seconds(outcome) for outcome in done]
    colours = [_BASELINE if outcome.case.is_baseline else _ON_DISK for outcome in done]
    places = range(len(done))
    axes.barh(places, seconds, color=colours)
    marked = [(outcome.achievable_seconds, place) for place, outcome in zip(places, done, strict=True)
              if outcome.achievable_seconds and not outcome.case.is_baseline]  # fmt: skip
    if marked:
        axes.plot(*zip(*marked, strict=True), "|", color=_MARK, markersize=18, markeredgewidth=2, label="possible here")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    furthest = max([*seconds, *(at for at, _ in marked)], default=1.0)
    for place, outcome in zip(places, done, strict=True):
        at = max(_seconds(outcome), outcome.achievable_seconds or 0.0) + furthest * 0.015
        assert outcome.measured is not None
        axes.text(at, place, f"{_seconds(outcome):.2f} s, {outcome.measured.peak / 1e6:,.0f} MB", va="center", size=9)
    axes.set_xlim(0, furthest * 1.25)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds per {wording.step}; with the peak of memory above {wording.above}")
    axes.spines[["top", "right"]].set_visible(False)
    machine = report.machine
    figure.suptitle(
        f"{wording.subject}\n{machine['cpu']}, {machine['cores']} cores, {machine['file_system']}; "
        f"{report.date}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _seconds(outcome: AnyOutcome) -> float:
    return outcome.measured.seconds if outcome.measured and outcome.measured.step_seconds else 0.0
