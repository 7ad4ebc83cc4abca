"""A scenario: one session, its models, its mishaps, and the order in which things happen."""

import enum
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from amusd.engine.synthetic import SyntheticModel
from amusd.protocol.finish import FinishRule
from amusd.protocol.strategy import Strategy

VOCABULARY = 7
Option = TypeVar("Option")


class Move(enum.Enum):
    """What can happen next, and to whom."""

    DRAFT = "the draft writes"
    GROW = "a branch of the draft grows by a token"
    PROPOSAL = "a proposal arrives"
    SEND = "the next message to the draft is sent"
    ADVANCE = "an advance arrives"
    ROLLBACK = "a rollback arrives"
    ANSWER = "the answer to a rollback arrives"
    FORWARD = "tokens to check arrive"
    BEGIN = "a pass begins"
    END = "a pass ends"
    VERDICT = "a verdict arrives"
    ALONE = "the orchestrator goes on without a proposal"
    REPEAT = "a message arrives once more"
    MOVED = "another verify service has the session"


@dataclass(frozen=True, slots=True)
class Setup:
    """One session, its models and its mishaps.

    ``dies_after`` counts moves until the draft is lost, ``verify_dies_after`` those until the
    verify service is lost and another one opens the session. ``silence`` is the share of contexts
    in which the drafter has nothing to propose. ``max_checked`` of 0 lets a pass check all that
    waits. ``num_collected`` proposals are waited for before an idle verify model gets them.
    ``impatient``: the orchestrator may tire of waiting at any time; if it may not, a message ends
    every wait. ``mixes_sources``: n-gram lookup proposes as well, as far as it pays, as often right
    as the model. ``collects``: the draft is told how many tokens to collect into a proposal.
    ``num_branches``: how many branches of up to ``branch_depth`` tokens the draft hangs on each
    token that it writes; ``max_branches``: how many of them the ledger forwards at a time.
    ``grows_branches``: a branch is sent with one token, and comes again with each further one.
    ``rest``: speculation is off in every other span of so many positions; 0: never. ``is_shared``:
    other sessions use the verify device, so passes are asked for ahead of time. ``has_chances``:
    the draft states the probability of each token, ``probability_of``. ``min_use``: the draft stops
    where a further token is less likely used.
    """

    strategy: Strategy = Strategy.AMUSD
    lookahead: int = 4
    agreement: float = 0.7
    num_prompt: int = 2
    max_tokens: int = 20
    seed: int = 0
    draft_context: int = 1000
    silence: float = 0.0
    tokens_per_step: int = 1
    stop_tokens: frozenset[int] = frozenset()
    max_checked: int = 0
    num_collected: int = 1
    num_repeats: int = 0
    dies_after: int | None = None
    verify_dies_after: int | None = None
    impatient: bool = False
    mixes_sources: bool = False
    collects: bool = True
    num_branches: int = 0
    branch_depth: int = 1
    max_branches: int = 4
    grows_branches: bool = False
    rest: int = 0
    is_shared: bool = False
    has_chances: bool = False
    min_use: float = 0.0

    def probability_of(self, position: int, token: int) -> float:
        """The draft's probability of a token, 0 if it is not known; some never are."""
        return (position * 5 + token) % 8 / 8 if self.has_chances else 0.0

    @property
    def prompt(self) -> list[int]:
        """The tokens that the session starts with."""
        return [(self.seed + index) % VOCABULARY for index in range(self.num_prompt)]

    @property
    def finish(self) -> FinishRule:
        """When the output is over."""
        return FinishRule(self.max_tokens, self.stop_tokens)

    @property
    def max_position(self) -> int:
        """Tokens of prompt and output at which the session is over."""
        return self.num_prompt + self.max_tokens


class Schedule:
    """Chooses moves: first as listed in ``choices``, then by lot, by the weight of each kind."""

    def __init__(
        self, seed: int = 0, weights: dict[Move, int] | None = None, choices: Sequence[int] = ()
    ) -> None:
        self._random = random.Random(seed)
        self._weights = weights or {}
        self._choices = deque(choices)

    def next_move(self, moves: list[Move]) -> Move:
        if self._choices:
            return moves[self._choices.popleft() % len(moves)]
        weights = [self._weights.get(move, 1) for move in moves]
        return self._random.choices(moves, weights)[0]

    def one_of(self, options: Sequence[Option]) -> Option:
        return self._random.choice(options)


def verify_models_own(setup: Setup) -> tuple[int, ...]:
    """What the verify model writes alone: the output that every run has to give."""
    model = SyntheticModel(VOCABULARY, setup.seed)
    tokens = list(setup.prompt)
    while True:
        tokens.append(model.next_token(tokens))
        output = tuple(tokens[setup.num_prompt :])
        if len(output) == setup.max_tokens or output[-1] in setup.stop_tokens:
            return output
