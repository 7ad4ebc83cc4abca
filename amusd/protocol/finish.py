"""When an output ends: at a stop token or stop text, or after the requested number of tokens."""

import enum
from dataclasses import dataclass
from typing import Protocol


class FinishReason(enum.Enum):
    """Why an output ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class FinishRule:
    """Ends an output at a stop token, which is part of it, or after ``max_tokens``."""

    max_tokens: int
    stop_token_ids: frozenset[int]

    def cut(
        self, tokens: tuple[int, ...], num_before: int
    ) -> tuple[tuple[int, ...], FinishReason | None]:
        """Return the tokens that belong to the output, and the reason if it ends there.

        Args:
            tokens: tokens that became final, in order.
            num_before: number of output tokens before them.
        """
        room = self.max_tokens - num_before
        for index, token in enumerate(tokens[:room]):
            if token in self.stop_token_ids:
                return tokens[: index + 1], FinishReason.STOP
        if len(tokens) >= room:
            return tokens[:room], FinishReason.LENGTH
        return tokens, None


class TextEnd(Protocol):
    """Finds the token that ends an output because of its text."""

    def find_end(self, tokens: tuple[int, ...]) -> int | None:
        """Add tokens of the output; return after how many of them it ends, or None.

        Each token of an output is added once, in order, before it is final.
        """
