"""The zero-latency bound of a deployment, with acceptance by place."""

import math

from amusd.performance.deployment import Deployment

_MAX_PROPOSED = 64
_LEAST_CHANCE = 1e-6  # runs that are less likely to last so long do not count


def bound_seconds(deployment: Deployment) -> float:
    """Return the zero-latency bound of one session, in seconds per token.

    Right proposals are ready whenever a pass starts, the same number in every pass, and at most as
    many as the draft writes during the pass. All sessions do the same.
    """
    num_sessions = deployment.num_sessions
    step_seconds = deployment.draft.of(num_sessions)
    found = deployment.verify.of(num_sessions)
    for num_proposed in range(1, _MAX_PROPOSED + 1):
        pass_seconds = deployment.verify.of(num_sessions * (1 + num_proposed))
        if num_proposed * step_seconds <= pass_seconds:
            found = min(found, pass_seconds / _tokens_per_pass(deployment, num_proposed))
    return found


def _tokens_per_pass(deployment: Deployment, num_proposed: int) -> float:
    """Return the mean tokens of a pass, over all passes of a run from its start to its end."""
    tokens, num_passes, chance, place = 0.0, 0.0, 1.0, 0
    last = len(deployment.acceptance) - 1
    while True:
        rights = [deployment.acceptance_at(place + index) for index in range(num_proposed + 1)]
        of_pass = 1.0 + math.fsum(math.prod(rights[:count]) for count in range(1, num_proposed + 1))
        if place >= last:  # all further passes are alike
            stay = min(math.prod(rights), 1.0 - _LEAST_CHANCE)
            num_left = chance / (1.0 - stay)
            return (tokens + num_left * of_pass) / (num_passes + num_left)
        tokens += chance * of_pass
        num_passes += chance
        # The run goes on if the draft also knows the token behind the proposals.
        chance *= math.prod(rights)
        place += num_proposed + 1
