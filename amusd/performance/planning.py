"""Compares the strategies of a deployment in simulation, and says which one to use."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from amusd.performance.deployment import Deployment
from amusd.performance.latency_bound import bound_seconds
from amusd.performance.simulation import (
    AMUSD,
    AUTOREGRESSIVE,
    BRANCHES,
    PUBLISHED,
    Method,
    simulate,
    speculative,
)

_LOOKAHEADS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_AMUSD_LOOKAHEADS = (8, 16, 32)
_NUM_BISECTIONS = 7
_SEARCH_SHARE = 4  # searches simulate a fourth of the tokens


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a strategy reaches with ``lookahead`` on ``num_devices``; ``lookahead`` 0: it has none.

    ``tokens_per_second`` are those of all sessions.
    """

    name: str
    lookahead: int
    num_devices: int
    seconds_per_token: float
    tokens_per_second: float
    draft_busy: float
    verify_busy: float

    @property
    def tokens_per_second_per_device(self) -> float:
        """Tokens of all sessions, divided by the devices that they take."""
        return self.tokens_per_second / self.num_devices


@dataclass(frozen=True, slots=True)
class DraftSize:
    """A draft whose step takes ``draft_scale`` times as long.

    ``acceptance`` is what it needs to be as fast as the given draft; None: no acceptance is enough.
    """

    draft_scale: float
    acceptance: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Plan:
    """All strategies of a deployment, and the bound of any of them."""

    deployment: Deployment
    forecasts: tuple[Forecast, ...]
    bound_seconds_per_token: float
    draft_sizes: tuple[DraftSize, ...]

    def forecast(self, name: str) -> Forecast:
        """Return the forecast of a strategy."""
        return next(one for one in self.forecasts if one.name == name)

    @property
    def fastest(self) -> Forecast:
        """The strategy with the least time per token; the simplest one if they are equal."""
        return min(self.forecasts, key=lambda one: round(one.seconds_per_token, 9))


def make_plan(deployment: Deployment, num_tokens: int, draft_scales: Iterable[float] = ()) -> Plan:
    """Simulate all strategies with ``num_tokens`` a session."""
    forecasts = [
        _forecast("autoregressive", AUTOREGRESSIVE, deployment, num_tokens),
        _best("speculative", map(speculative, _LOOKAHEADS), deployment, num_tokens),
        _forecast("AMUSD as published", PUBLISHED, deployment, num_tokens),
        _best("AMUSD", _with_lookaheads(AMUSD), deployment, num_tokens),
    ]
    if deployment.branching is not None:
        methods = _with_lookaheads(BRANCHES)
        forecasts.append(_best("AMUSD with branches", methods, deployment, num_tokens))
    return Plan(
        deployment,
        tuple(forecasts),
        bound_seconds(deployment),
        tuple(break_even(deployment, num_tokens, scale) for scale in draft_scales),
    )


def break_even(deployment: Deployment, num_tokens: int, draft_scale: float) -> DraftSize:
    """Return the acceptance that makes a draft of another size as fast as the given one.

    The chances to be wrong change by one factor at all places.
    """
    num_tokens = _search_tokens(num_tokens)
    method = AMUSD if deployment.branching is None else BRANCHES
    target = simulate(deployment, method, num_tokens).seconds_per_token
    other = replace(deployment, draft=deployment.draft.scaled(draft_scale))

    def with_error(factor: float) -> Deployment:
        found = (min(1.0, max(0.0, 1.0 - (1.0 - one) * factor)) for one in deployment.acceptance)
        return replace(other, acceptance=tuple(found))

    def is_enough(factor: float) -> bool:
        return simulate(with_error(factor), method, num_tokens).seconds_per_token <= target

    if not is_enough(0.0):
        return DraftSize(draft_scale, None)
    low, high = 0.0, 1.0 / max(1e-9, 1.0 - min(deployment.acceptance))
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_enough(middle) else (low, middle)
    return DraftSize(draft_scale, with_error(low).acceptance)


def verdict(plan: Plan) -> str:
    """Return in one line what pays."""
    plain, other, best = plan.forecast("autoregressive"), plan.forecast("speculative"), plan.fastest
    if best is plain:
        return "Use plain decoding: no strategy with this draft is faster."
    speedup = plain.seconds_per_token / best.seconds_per_token
    if best is other:
        name = f"speculative decoding with look-ahead {best.lookahead}"
        return f"Use {name}: {speedup:.2f}x plain decoding."
    ratio = other.seconds_per_token / best.seconds_per_token
    return f"Use {best.name}: {speedup:.2f}x plain decoding, {ratio:.2f}x speculative decoding."


def pays_per_device(plan: Plan) -> bool:
    """Return whether the fastest strategy gives more tokens per device than plain decoding."""
    plain = plan.forecast("autoregressive").tokens_per_second_per_device
    return plan.fastest.tokens_per_second_per_device > plain


def _with_lookaheads(method: Method) -> Iterable[Method]:
    return (replace(method, lookahead=lookahead) for lookahead in _AMUSD_LOOKAHEADS)


def _best(
    name: str, methods: Iterable[Method], deployment: Deployment, num_tokens: int
) -> Forecast:
    """Return the forecast of the fastest of ``methods``."""
    short = _search_tokens(num_tokens)
    best = min(methods, key=lambda one: simulate(deployment, one, short).seconds_per_token)
    return _forecast(name, best, deployment, num_tokens)


def _search_tokens(num_tokens: int) -> int:
    return max(1, num_tokens // _SEARCH_SHARE)


def _forecast(name: str, method: Method, deployment: Deployment, num_tokens: int) -> Forecast:
    run = simulate(deployment, method, num_tokens)
    has_draft = method is not AUTOREGRESSIVE
    return Forecast(
        name,
        method.max_lookahead if has_draft else 0,
        2 if has_draft else 1,
        run.seconds_per_token,
        run.tokens_per_second,
        run.draft_busy_seconds / run.seconds,
        run.verify_busy_seconds / run.seconds,
    )
