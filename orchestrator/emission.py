"""What a session hands to the client's side: final tokens, and what is known about them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from amusd.protocol.events import Verdict
from amusd.sampling.parameters import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Emission:
    """Tokens of an output that became final, in order, 1 or more.

    ``logprobs`` has one entry a token, or none at all. ``prompt_logprobs`` continues those of the
    prompt's tokens, from the second one on.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @classmethod
    def of(cls, tokens: tuple[int, ...], event: object) -> Self:
        """Return final tokens with the log-probabilities of the verdict that made them final.

        Another event than a verdict has none.
        """
        if not isinstance(event, Verdict):
            return cls(tokens)
        return cls(tokens, event.logprobs[: len(tokens)], event.prompt_logprobs)


Emit = Callable[[Emission], None]
"""Takes final tokens of an output, at once."""
