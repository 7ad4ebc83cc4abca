"""An engine that tells what it was asked for."""

from collections.abc import Sequence

from amusd.engine.interface import ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel


class CountingEngine(SyntheticEngine):
    """Remembers the feeds of each pass."""

    def __init__(self, model: SyntheticModel) -> None:
        super().__init__(model)
        self.passes: list[list[ScheduledSequence]] = []

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        self.passes.append(list(feeds))
        return super().run(feeds)

    def sizes(self) -> list[list[int]]:
        return [[len(feed.tokens) for feed in feeds] for feeds in self.passes]
