"""What a caller may ask for beside the prompt: the options of a generation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from amusd.protocol.strategy import Strategy
from amusd.sampling.parameters import LogprobsOptions


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """Options of a generation; None leaves the choice to the server.

    ``protos/amusd/v1/orchestrator.proto`` and ``sampling.proto`` have the range of each. Several
    have a short form:

    - ``strategy``: also its name, such as ``"autoregressive"``.
    - ``stop``: one text or several.
    - ``logprobs``: the number of likeliest tokens beside the chosen one; True is 0, False is None.
    - ``json_schema``: a dictionary, or its JSON text. At most one of ``json_schema``,
      ``json_object``, ``regex``, ``choices`` and ``grammar`` is set.
    - ``n``: the number of completions.

    ``tools``, ``template_arguments`` and ``parse_special_tokens`` are for conversations only.
    ``timeline`` asks for a record of all messages and device times.
    """

    strategy: Strategy | str | None = None
    max_tokens: int | None = None
    lookahead: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    timeline: bool = False
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    include_stop: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    seed: int | None = None
    logprobs: LogprobsOptions | int | bool | None = None
    n: int = 1
    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choices: Sequence[str] | None = None
    grammar: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parse_special_tokens: bool = False


NO_OPTIONS = Options()
"""Everything as the server chooses."""


class OptionFields(TypedDict, total=False):
    """The fields of ``Options`` as keyword arguments."""

    strategy: Strategy | str | None
    max_tokens: int | None
    lookahead: int | None
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    timeline: bool
    min_tokens: int
    stop: str | Sequence[str]
    include_stop: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[Sequence[int]]
    seed: int | None
    logprobs: LogprobsOptions | int | bool | None
    n: int
    json_schema: Mapping[str, Any] | str | None
    json_object: bool
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None
    tools: Sequence[Mapping[str, Any]]
    template_arguments: Mapping[str, Any]
    parse_special_tokens: bool


def logprobs_options(wanted: LogprobsOptions | int | bool | None) -> LogprobsOptions | None:
    """Return what ``Options.logprobs`` stands for; None: no log-probabilities.

    Raises:
        InvalidInputError: more likeliest tokens than are returned.
    """
    if wanted is None or wanted is False:
        return None
    if isinstance(wanted, LogprobsOptions):
        return wanted
    return LogprobsOptions(num_top=0 if wanted is True else wanted)
