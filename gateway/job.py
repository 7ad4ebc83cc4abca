"""What one HTTP request asks for: the calls to make, and how their answers are written."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from amusd.v1 import orchestrator_pb2
from gateway.tool_choice import ToolChoice


@dataclass(frozen=True, slots=True)
class Job:
    """A translated request.

    Completion i of prompt p is choice ``p * num_completions + i`` of the answer. ``model`` is the
    name in the answer; empty: the first served one. ``logprobs`` says whether choices have
    log-probabilities. ``echo`` has the text of each prompt to repeat, empty for a prompt of token
    ids; None: nothing is repeated. With ``echo_only`` the one token that the contract requires is
    left out. ``ignored`` names the fields that have no effect.
    """

    requests: tuple[orchestrator_pb2.GenerateRequest, ...]
    model: str = ""
    num_completions: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    token_ids: bool = False
    echo: tuple[str, ...] | None = None
    echo_only: bool = False
    tools: ToolChoice | None = None
    ignored: Sequence[str] = field(default=())

    @property
    def num_choices(self) -> int:
        """Number of choices in the answer."""
        return len(self.requests) * self.num_completions
