"""Draws what ``amusd plan`` expects, over acceptance or over the draft's step time.

It imports matplotlib, which is an optional dependency. Only ``amusd plan`` imports this module.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from amusd.performance.planning import Plan

_STYLES = {
    "autoregressive": ("#8fb8de", "solid"),
    "speculative": ("#d98b2b", "solid"),
    "AMUSD as published": ("#2a9d5c", "dashed"),
    "AMUSD": ("#2a9d5c", "solid"),
    "AMUSD with branches": ("#1f6fb2", "solid"),
}


def draw(path: Path, label: str, values: Sequence[float], plans: Sequence[Plan]) -> None:
    """Write a PNG with a line for each strategy; ``plans`` belong to ``values`` of ``label``."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for forecast in plans[0].forecasts:
        times = [1e3 * plan.forecast(forecast.name).seconds_per_token for plan in plans]
        colour, style = _STYLES[forecast.name]
        axes.plot(values, times, color=colour, linestyle=style, marker=".", label=forecast.name)
    bounds = [1e3 * plan.bound_seconds_per_token for plan in plans]
    axes.plot(values, bounds, color="#555555", linestyle="dotted", label="zero-latency bound")
    axes.set_xlabel(label)
    axes.set_ylabel("expected milliseconds per token")
    axes.set_ylim(bottom=0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)
