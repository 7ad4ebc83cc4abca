"""The cost model of decoding: expected tokens and seconds, from acceptance and step times.

``acceptance`` is the probability, 0 to 1, that a proposed token is right if all proposed tokens
before it are right. All times are seconds per token. They leave out network and scheduling.
"""

from collections.abc import Callable

PassSeconds = Callable[[int], float]
"""Seconds of a verify pass over n proposed tokens, n from 0."""


def expected_tokens(acceptance: float, lookahead: int) -> float:
    """Return the mean number of tokens that a pass over ``lookahead`` proposals yields.

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
    """Return the time per token of drafting ``lookahead`` tokens, then verifying them."""
    cycle = lookahead * draft_seconds + pass_seconds(lookahead)
    return cycle / expected_tokens(acceptance, lookahead)


def zero_latency_bound_seconds(
    acceptance: float, draft_seconds: float, pass_seconds: PassSeconds, max_lookahead: int = 64
) -> float:
    """Return a lower bound of the time per token with one draft and one verify model.

    The bound assumes that right proposals are ready whenever a pass starts. A pass checks at most
    as many tokens as the draft model writes during one pass.
    """
    best = pass_seconds(0)
    for num_proposed in range(1, max_lookahead + 1):
        if num_proposed * draft_seconds <= pass_seconds(num_proposed):
            tokens = expected_tokens(acceptance, num_proposed)
            best = min(best, pass_seconds(num_proposed) / tokens)
    return best
