"""The plan of a session: what a request asks for, checked and complete; and its outcome."""

from dataclasses import dataclass, replace

from amusd.analysis.generation_statistics import Statistics
from amusd.analysis.timeline import Timeline
from amusd.policy.speculation_policy import AsynchronousPolicy
from amusd.protocol.draft_probabilities import MIN_USE_PROBABILITY
from amusd.protocol.finish import FinishReason, FinishRule
from amusd.protocol.strategy import Strategy
from amusd.sampling.parameters import GREEDY, SequenceSampling


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """What to generate and how: a request that has been checked.

    ``records_timeline`` keeps all events to the end, ``streams_timeline`` hands them out as they
    happen. The session opens on the verify replica ``preferred_verify``, an address, while that
    has room.
    """

    session_id: str
    tokens: tuple[int, ...]
    strategy: Strategy
    lookahead: int
    finish: FinishRule
    verify_timeout_seconds: float
    draft_timeout_seconds: float
    replica_timeout_seconds: float = 10.0
    records_timeline: bool = False
    streams_timeline: bool = False
    max_branches: int = 0
    policy: AsynchronousPolicy = AsynchronousPolicy.ADAPTIVE
    sampling: SequenceSampling = GREEDY
    preferred_verify: str = ""

    @property
    def may_rest(self) -> bool:
        """Whether the session may decode without proposals while that is faster."""
        return self.strategy is Strategy.AMUSD and self.policy is AsynchronousPolicy.ADAPTIVE

    @property
    def min_use_probability(self) -> float:
        """Where the draft stops, by its own probabilities; 0: at its look-ahead only.

        Sampled tokens can be right more often than they are likely, because both models add the
        same noise. So with a temperature the draft does not stop.
        """
        stops = self.may_rest and self.sampling.parameters.is_greedy
        return MIN_USE_PROBABILITY if stops else 0.0

    def sampling_after(self, num_output: int) -> SequenceSampling:
        """Return the sampling to open a session with that has ``num_output`` tokens of output.

        The log-probabilities of the prompt come with the first of these tokens, and only once.
        """
        options = self.sampling.logprobs
        if not num_output or options is None or not options.has_prompt:
            return self.sampling
        return replace(self.sampling, logprobs=replace(options, has_prompt=False))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a generation ended, and what it took."""

    reason: FinishReason
    statistics: Statistics
    timeline: Timeline | None = None
