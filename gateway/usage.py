"""Token counts and speculation figures of an answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from amusd.v1 import orchestrator_pb2


@dataclass(slots=True)
class Usage:
    """The statistics of the completions of an answer, as they end.

    The completions of one prompt share its tokens, which count once.
    """

    num_choices: int
    echo_only: bool = False
    _completions: list[orchestrator_pb2.Statistics] = field(default_factory=list)
    _prompts: dict[int, orchestrator_pb2.Statistics] = field(default_factory=dict)

    def add(self, prompt: int, statistics: orchestrator_pb2.Statistics) -> None:
        """Count a completion of the prompt number ``prompt``."""
        self._completions.append(statistics)
        self._prompts.setdefault(prompt, statistics)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all outputs."""
        return 0 if self.echo_only else sum(one.num_output_tokens for one in self._completions)

    def fields(self) -> dict[str, Any]:
        """Return the object ``usage``."""
        num_prompt = sum(one.num_prompt_tokens for one in self._prompts.values())
        num_cached = sum(one.num_cached_prompt_tokens for one in self._prompts.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": num_prompt + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def metrics(self) -> dict[str, Any] | None:
        """Return the object ``metrics`` in vLLM's shape.

        None for several choices, whose figures one object cannot hold, and for plain decoding.
        """
        if self.num_choices != 1 or len(self._completions) != 1:
            return None
        (statistics,) = self._completions
        if statistics.strategy == orchestrator_pb2.STRATEGY_AUTOREGRESSIVE:
            return None
        return {"speculative_decoding": speculation_figures(statistics)}


def speculation_figures(statistics: orchestrator_pb2.Statistics) -> dict[str, Any]:
    """Return vLLM's figures of speculative decoding.

    A step is a pass that compared at least one proposed token. ``acceptance_histogram[j]`` counts
    the steps that accepted j of them.
    """
    per_position = statistics.acceptance_per_position
    num_steps = per_position[0].num_checked if per_position else 0
    # A pass accepts tokens from the first one on, so those that accepted at least j are known.
    at_least = [num_steps, *(one.num_accepted for one in per_position)]
    num_accepted = sum(at_least[1:])
    num_drafted = max(statistics.num_in_passes, num_accepted)
    return {
        "mean_acceptance_length": 1.0 + _ratio(num_accepted, num_steps),
        "draft_acceptance_rate": _ratio(num_accepted, num_drafted),
        "acceptance_histogram": _differences(at_least),
        "num_spec_steps": num_steps,
        "num_draft_tokens": num_drafted,
        "num_accepted_draft_tokens": num_accepted,
    }


def _differences(at_least: Sequence[int]) -> list[int]:
    return [one - after for one, after in zip(at_least, [*at_least[1:], 0], strict=True)]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
