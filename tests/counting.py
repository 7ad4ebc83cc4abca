"""An engine that tells what it was asked for."""

from collections.abc import Sequence

from amusd.engine.interface import Feed
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel


class CountingEngine(SyntheticEngine):
    """Remembers the feeds of each pass."""

    def __init__(self, model: SyntheticModel) -> None:
        super().__init__(model)
        self.passes: list[list[Feed]] = []

    def run(self, feeds: Sequence[Feed]) -> list[list[int]]:
        self.passes.append(list(feeds))
        return super().run(feeds)

    def sizes(self) -> list[list[int]]:
        return [[len(feed.tokens) for feed in feeds] for feeds in self.passes]
