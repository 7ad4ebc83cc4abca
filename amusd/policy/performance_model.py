"""What decoding should cost: expected tokens and time by acceptance and step times.

``acceptance`` is the chance that a proposed token is right if its predecessors were, 0 to 1.
All times are seconds per token on an otherwise ideal system (no network, no scheduling).
"""

from collections.abc import Callable

PassSeconds = Callable[[int], float]
"""Time of a verify pass over n proposed tokens, n from 0."""


def expected_tokens(acceptance: float, lookahead: int) -> float:
    """Return the tokens a pass over ``lookahead`` proposals yields on average.

    ``(1 - a^(k+1)) / (1 - a)``: Leviathan et al., arXiv 2211.17192, equation 1.
    """
    if acceptance >= 1.0:
        return lookahead + 1.0
    return float((1.0 - acceptance ** (lookahead + 1)) / (1.0 - acceptance))


def autoregressive_seconds(pass_seconds: PassSeconds) -> float:
    """Return the time per token of the verify model alone."""
    return pass_seconds(0)


def speculative_seconds(
    acceptance: float, lookahead: int, draft_seconds: float, pass_seconds: PassSeconds
) -> float:
    """Return the time per token of drafting ``lookahead`` tokens and verifying them in turn."""
    cycle = lookahead * draft_seconds + pass_seconds(lookahead)
    return cycle / expected_tokens(acceptance, lookahead)


def zero_latency_bound_seconds(
    acceptance: float, draft_seconds: float, pass_seconds: PassSeconds, max_lookahead: int = 64
) -> float:
    """Return the least time per token that one draft beside one verify model can reach.

    Proposals are always ready, on the right branch; a pass checks at most what the draft can
    write while a pass runs.
    """
    best = pass_seconds(0)
    for num_proposed in range(1, max_lookahead + 1):
        if num_proposed * draft_seconds <= pass_seconds(num_proposed):
            tokens = expected_tokens(acceptance, num_proposed)
            best = min(best, pass_seconds(num_proposed) / tokens)
    return best
