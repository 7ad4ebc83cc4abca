"""Draws the device timelines of a generation, draft above verify, as in the AMUSD paper.

It imports matplotlib, which is an optional dependency. Only ``amusd timeline`` imports this module.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from amusd.analysis.device_timeline import DeviceTimeline, DeviceTimelines, Kind, Span, Work, checks
from amusd.analysis.timeline import Timeline
from amusd.protocol.events import Rollback, Verdict

_COLOURS = {
    Kind.ACCEPTED: "#2a9d5c",
    Kind.REJECTED: "#d1495b",
    Kind.WASTED: "#f0b8a8",
    Kind.PREFILL: "#b9b4d0",
    Kind.AUTOREGRESSIVE: "#8fb8de",
    Kind.CONFIRMED: "#1f6fb2",
    Kind.CORRECTED: "#d98b2b",
}
_LABELS = {
    Kind.ACCEPTED: "draft: accepted",
    Kind.REJECTED: "draft: rejected",
    Kind.WASTED: "draft: wasted",
    Kind.PREFILL: "prefill",
    Kind.AUTOREGRESSIVE: "verify: autoregressive",
    Kind.CONFIRMED: "verify: all accepted",
    Kind.CORRECTED: "verify: corrected",
}
_ROLLBACK_COLOUR = "#a4001d"
_BOTH_COLOUR = "#555555"
# Bottom and height of each row.
_DRAFT, _VERIFY, _BOTH = (1.15, 0.8), (0.0, 0.8), (-0.4, 0.18)
_MAX_OUTLINED = 400  # outlines of more bars would hide the bars
_MAX_ARROWS = 250
_MIN_SHARE_FOR_NUMBER = 0.012  # of the picture's width


def draw(
    timeline: Timeline, devices: DeviceTimelines, window: Span, title: str, path: Path
) -> None:
    """Draw the work within ``window`` and write it to ``path`` as PNG."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    axes = figure.subplots()
    shown = [
        *_bars(axes, devices.draft, _DRAFT, window),
        *_bars(axes, devices.verify, _VERIFY, window),
    ]
    both = [span for span in devices.both if _is_within(span, window)]
    axes.broken_barh(_ranges(both), _BOTH, color=_BOTH_COLOUR)
    _numbers(axes, devices.verify, window)
    _arrows(axes, devices, window)
    has_rollbacks = _rollbacks(axes, timeline, window)
    axes.set_xlim(1e3 * window.started_seconds, 1e3 * window.ended_seconds)
    axes.set_ylim(-0.5, 2.15)
    axes.set_yticks([bottom + height / 2 for bottom, height in (_DRAFT, _VERIFY, _BOTH)])
    axes.set_yticklabels(["draft", "verify", "both work"])
    axes.set_xlabel("milliseconds since the request arrived")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _legend(figure, shown, has_rollbacks)
    figure.savefig(path, format="png", dpi=150)


def _bars(axes: Axes, device: DeviceTimeline, row: tuple[float, float], window: Span) -> list[Kind]:
    """Draw the work of a device; return the kinds that occur."""
    works = [work for work in device.works if _is_within(work.span, window)]
    width = 0.4 if len(works) <= _MAX_OUTLINED else 0.0
    kinds = [kind for kind in Kind if any(work.kind is kind for work in works)]
    for kind in kinds:
        spans = [work.span for work in works if work.kind is kind]
        axes.broken_barh(
            _ranges(spans), row, facecolor=_COLOURS[kind], edgecolor="white", linewidth=width
        )
    return kinds


def _numbers(axes: Axes, device: DeviceTimeline, window: Span) -> None:
    """Write the number of final tokens on each pass that is wide enough."""
    last_passes = {id(work.message): work for work in device.works}
    for work in last_passes.values():
        if work.span.seconds < _MIN_SHARE_FOR_NUMBER * window.seconds:
            continue
        middle = (work.span.started_seconds + work.span.ended_seconds) / 2
        is_shown = window.started_seconds < middle < window.ended_seconds
        if is_shown and isinstance(work.message, Verdict):
            number = str(work.message.num_accepted + 1)
            axes.text(
                1e3 * middle, sum(_VERIFY) / 2, number, color="white", ha="center", va="center"
            )


def _arrows(axes: Axes, devices: DeviceTimelines, window: Span) -> None:
    """Draw a line from each step to the pass that checked its token, if there are few enough."""
    lines = [
        [
            (1e3 * check.step.span.ended_seconds, _DRAFT[0]),
            (1e3 * check.checked_by.span.started_seconds, sum(_VERIFY)),
        ]
        for check in checks(devices)
        if _is_within(_between(check.step, check.checked_by), window)
    ]
    if len(lines) <= _MAX_ARROWS:
        axes.add_collection(LineCollection(lines, colors="#999999", linewidths=0.6))


def _rollbacks(axes: Axes, timeline: Timeline, window: Span) -> bool:
    """Mark rollbacks by vertical lines; return whether there are any."""
    times = [
        1e3 * event.seconds
        for event in timeline.events
        if isinstance(event.message, Rollback)
        and window.started_seconds <= event.seconds <= window.ended_seconds
    ]
    top = sum(_DRAFT) + 0.05
    axes.vlines(times, _VERIFY[0], top, colors=_ROLLBACK_COLOUR, linestyles="dashed", linewidth=0.9)
    axes.plot(times, [top] * len(times), "v", color=_ROLLBACK_COLOUR, markersize=5)
    return bool(times)


def _legend(figure: Figure, shown: Sequence[Kind], has_rollbacks: bool) -> None:
    handles: list[Patch | Line2D] = [
        Patch(color=_COLOURS[kind], label=_LABELS[kind]) for kind in Kind if kind in shown
    ]
    if has_rollbacks:
        handles.append(
            Line2D([], [], color=_ROLLBACK_COLOUR, linestyle="dashed", marker="v", label="rollback")
        )
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=9, frameon=False)


def _between(step: Work, checked_by: Work) -> Span:
    """Return the time from the end of a step to the start of the pass that checked it."""
    ends = (step.span.ended_seconds, checked_by.span.started_seconds)
    return Span(min(ends), max(ends))


def _is_within(span: Span, window: Span) -> bool:
    """Whether ``span`` and ``window`` overlap."""
    return (
        span.ended_seconds >= window.started_seconds
        and span.started_seconds <= window.ended_seconds
    )


def _ranges(spans: Sequence[Span]) -> list[tuple[float, float]]:
    return [(1e3 * span.started_seconds, 1e3 * span.seconds) for span in spans]
