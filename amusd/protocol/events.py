"""The messages of one session: events that come in, and decisions that follow from them.

Positions are absolute (index in prompt and output, from 0). Epochs count rollbacks.
"""

from dataclasses import dataclass

from amusd.protocol.draft_source import DraftSource
from amusd.sampling.parameters import TokenLogprobs


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """When a device worked on a session, by the clock of its own host."""

    started_unix_nanos: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens for the case that the verify model writes ``token`` at ``position``.

    It hangs on the run of the epoch of its message, which has another token at ``position``. If
    that one is rejected in favor of ``token``, the branch begins the next epoch: its ``tokens``,
    at least one, stand at ``position + 1`` and after. ``probabilities`` as in ``Proposal``.
    """

    position: int
    token: int
    tokens: tuple[int, ...]
    source: DraftSource = DraftSource.MODEL
    probabilities: tuple[float, ...] = ()

    @property
    def root(self) -> tuple[int, int]:
        """The outcome that it is for."""
        return self.position, self.token


@dataclass(frozen=True, slots=True)
class DraftedRun:
    """Drafted tokens that are ready to be proposed, from ``position`` on, and branches.

    Neither: ``source`` was the last that was asked.
    """

    epoch: int
    position: int
    tokens: tuple[int, ...]
    source: DraftSource = DraftSource.MODEL
    branches: tuple[Branch, ...] = ()
    probabilities: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """Consecutive drafted tokens of one source, ``[position, position + len(tokens))``.

    ``branches`` hang on the tokens of this and of earlier proposals of the epoch. Neither tokens
    nor branches: the drafter has nothing to propose at ``position``; ``source`` was asked last.
    ``draft_seconds`` is the time of its ``num_steps`` model steps. ``device_seconds`` is the
    session's share of the device's time: of these steps, and of steps that drafted its branches.
    ``steps`` says when each of the ``num_steps`` ran, if the session records a timeline.
    ``probabilities`` are the draft model's own, one for each of ``tokens``, 0 where it is not
    known; none: all are unknown.
    """

    epoch: int
    position: int
    tokens: tuple[int, ...]
    draft_seconds: float = 0.0
    num_steps: int = 0
    source: DraftSource = DraftSource.MODEL
    device_seconds: float = 0.0
    steps: tuple[DeviceTime, ...] = ()
    branches: tuple[Branch, ...] = ()
    probabilities: tuple[float, ...] = ()

    @property
    def all_tokens(self) -> tuple[int, ...]:
        """Its tokens and those of its branches, in no useful order."""
        return _all_tokens(self.tokens, self.branches)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of one pass of the verify model over ``num_checked`` tokens from ``position`` on.

    The first ``num_accepted`` are the verify model's own, and ``next_token`` stands at
    ``position + num_accepted``. ``pass_seconds`` is the time of the pass, ``device_seconds`` the
    session's share of that time. ``num_cached`` tokens of the prompt were not computed but copied;
    only a first verdict has them. ``passes`` says when the pass ran, and before it those that
    computed chunks of the prompt, if the session records a timeline. ``logprobs`` are those of the
    ``num_accepted + 1`` tokens that became final, and ``prompt_logprobs`` those of the prompt from
    its second token on, in a first verdict; both are empty unless the session asks for them.
    """

    epoch: int
    position: int
    num_checked: int
    num_accepted: int
    next_token: int
    pass_seconds: float = 0.0
    device_seconds: float = 0.0
    num_cached: int = 0
    passes: tuple[DeviceTime, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Forward:
    """Send ``tokens``, and ``branches`` that hang on them and on earlier ones, to be verified.

    Neither tokens nor branches ask for a pass without proposals. A pass checks at most
    ``max_checked`` tokens from now on; 0 means the service's own limit. ``probabilities`` as in
    ``Proposal``.
    """

    epoch: int
    position: int
    tokens: tuple[int, ...]
    max_checked: int = 0
    branches: tuple[Branch, ...] = ()
    probabilities: tuple[float, ...] = ()

    @property
    def all_tokens(self) -> tuple[int, ...]:
        """Its tokens and those of its branches, in no useful order."""
        return _all_tokens(self.tokens, self.branches)


@dataclass(frozen=True, slots=True)
class Advance:
    """Send final ``tokens`` from ``position`` on to the draft service.

    It may draft ``lookahead`` tokens beyond them from now on, and collects ``tokens_per_proposal``
    into one proposal; 0 leaves either as it is.
    """

    epoch: int
    position: int
    tokens: tuple[int, ...]
    lookahead: int = 0
    tokens_per_proposal: int = 0


@dataclass(frozen=True, slots=True)
class Rollback:
    """Roll the draft back: ``corrected_token`` is the token at ``verified_position - 1``.

    ``lookahead`` and ``tokens_per_proposal`` as in ``Advance``. The first proposal of the new
    epoch holds ``first_proposal`` tokens; 0: as many as any other. ``branch_tokens`` follow the
    corrected token: a branch that the new epoch begins with. They count as proposed.
    """

    epoch: int
    verified_position: int
    corrected_token: int
    lookahead: int = 0
    tokens_per_proposal: int = 0
    first_proposal: int = 0
    branch_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from an event: what to send, and the tokens that became final."""

    rollback: Rollback | None = None
    advance: Advance | None = None
    forward: Forward | None = None
    committed: tuple[int, ...] = ()


NOTHING = Decision()


def _all_tokens(tokens: tuple[int, ...], branches: tuple[Branch, ...]) -> tuple[int, ...]:
    if not branches:
        return tokens
    return (*tokens, *(token for one in branches for token in (one.token, *one.tokens)))
