"""A draft worker with a synthetic model, and what it sends to a session."""

from dataclasses import replace

from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.errors import AmusdError
from amusd.protocol.events import Proposal
from draft_service.drafters import model_drafter, ngram_drafter
from draft_service.drafting import DraftOpening, DraftWorker

LIMITS = ServiceLimits(max_sessions=4, max_context=64, max_lookahead=8)
OPENING = DraftOpening("a", [1, 2, 3], DraftLimits(lookahead=4, max_position=40))


class Receiver:
    """What a session has sent."""

    def __init__(self) -> None:
        self.proposals: list[Proposal] = []
        self.errors: list[AmusdError] = []

    def __call__(self, message: Proposal | AmusdError) -> None:
        if isinstance(message, Proposal):
            self.proposals.append(message)
        else:
            self.errors.append(message)

    @property
    def tokens(self) -> list[int]:
        return [token for proposal in self.proposals for token in proposal.tokens]


def make_engine(batch: int = 1, vocabulary: int = 50) -> SyntheticEngine:
    return SyntheticEngine(SyntheticModel(vocabulary=vocabulary, batch=batch))


def make_worker(
    batch: int = 1, prefill_budget: int = 100, with_ngrams: bool = False
) -> DraftWorker:
    drafter = model_drafter(make_engine(batch), with_ngrams)
    return DraftWorker(drafter, LIMITS, prefill_budget)


def make_ngram_worker() -> DraftWorker:
    return DraftWorker(ngram_drafter(), LIMITS, prefill_budget=100)


def opened(worker: DraftWorker, opening: DraftOpening = OPENING) -> Receiver:
    receiver = Receiver()
    worker.open(opening, receiver)
    return receiver


def named(name: str, *prompt: int) -> DraftOpening:
    return replace(OPENING, session_id=name, tokens=list(prompt) or OPENING.tokens)


def run(worker: DraftWorker) -> int:
    """Run all batches that are due; return their number."""
    num_batches = 0
    while worker.step():
        num_batches += 1
    return num_batches


def written(prompt: list[int], num_tokens: int) -> list[int]:
    """Return the model's own tokens after ``prompt``."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(SyntheticModel(vocabulary=50).next_token(tokens))
    return tokens[len(prompt) :]
