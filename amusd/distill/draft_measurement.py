"""Measures drafts with one verify model: acceptance, step times, predicted speed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from amusd.analysis.acceptance import (
    Prediction,
    Predictor,
    Share,
    acceptance_per_position,
    share_of_hits,
)
from amusd.analysis.generation_statistics import PositionAcceptance
from amusd.distill.cut import fingerprint, output_head, stop_ids
from amusd.distill.measured_acceptance import (
    Answer,
    Model,
    greedy_hits,
    load_answers,
    sampled_hits,
    save_answers,
    write_answers,
)
from amusd.distill.writer import TextWriter
from amusd.engine.interface import Engine
from amusd.engine.loading.device import DeviceSettings
from amusd.engine.loading.model_loading import Role, load_model, locate_model
from amusd.engine.loading.reduced_head import load_causal_lm
from amusd.engine.pass_timing import median_pass_seconds
from amusd.fleet.model_description import PROMPT_LOOKUP, check_pair, is_synthetic
from amusd.prompts import Prompt, encode
from amusd.protocol.errors import InvalidInputError

_REPEAT = 7  # timed passes of each size


@dataclass(frozen=True, slots=True)
class MeasurePlan:
    """What to measure; ``temperature`` 0 is greedy only, ``answers`` a file that caches answers."""

    verify: str
    prompts: tuple[Prompt, ...]
    max_tokens: int
    temperature: float
    draws: int
    lookahead: int
    answers: Path | None
    device: DeviceSettings


@dataclass(frozen=True, slots=True)
class DraftReport:
    """The figures of one draft; times in seconds."""

    draft: str
    num_layers: int
    num_computed: int  # parameters read for one token: all but the embedding
    draft_seconds: float
    greedy: Share
    sampled: Share | None
    overlap: float | None
    acceptance_per_position: tuple[PositionAcceptance, ...]
    speculative: Prediction
    asynchronous: Prediction


class Bench:
    """A verify model with its answers and pass times, for the measurement of drafts."""

    def __init__(self, plan: MeasurePlan) -> None:
        """Load the verify model, write its answers, and time its passes.

        Raises:
            InvalidInputError: the model cannot be loaded, or cached answers belong to another one.
            UnavailableError: the answers cannot be written.
        """
        self._plan = plan
        self._verify = _load(plan.verify, "verify", plan.device)
        tokenizer = AutoTokenizer.from_pretrained(locate_model(plan.verify, "verify"))
        self._writer = TextWriter(self._verify.model, stop_ids(self._verify.model, tokenizer))
        prompts = [encode(prompt, tokenizer) for prompt in plan.prompts]
        self._greedy = self._greedy_answers(prompts)
        self._sampled: list[Answer] = []
        if plan.temperature:
            self._sampled = write_answers(self._writer, prompts, plan.max_tokens, plan.temperature)
        sizes = range(1, plan.lookahead + 2)
        self._seconds = median_pass_seconds(self._verify.engine, sizes, _REPEAT)

    def pass_seconds(self, num_proposed: int) -> float:
        """Return the time of a verify pass over ``num_proposed`` drafted tokens."""
        return self._seconds[num_proposed + 1]

    def measure(self, draft: str) -> DraftReport:
        """Measure a draft.

        Raises:
            InvalidInputError: the draft cannot be loaded, or has another vocabulary.
        """
        loaded = _load(draft, "draft", self._plan.device)
        check_pair(loaded.engine.description, self._verify.engine.description)
        model = Model(loaded.model, loaded.head_ids)
        hits = [greedy_hits(model, answer) for answer in self._greedy]
        sampled, overlap = self._sample(model)
        positions = acceptance_per_position(hits, self._plan.lookahead)
        draft_seconds = median_pass_seconds(loaded.engine, [1], 5 * _REPEAT)[1]
        predictor = Predictor(positions, draft_seconds, self.pass_seconds)
        return DraftReport(
            draft=draft,
            num_layers=int(loaded.model.config.get_text_config().num_hidden_layers),
            num_computed=_num_computed(loaded.model),
            draft_seconds=draft_seconds,
            greedy=share_of_hits(hits),
            sampled=sampled,
            overlap=overlap,
            acceptance_per_position=positions,
            speculative=predictor.speculative(),
            asynchronous=predictor.asynchronous(),
        )

    def _sample(self, model: Model) -> tuple[Share | None, float | None]:
        if not self._sampled:
            return None, None
        target = Model(self._verify.model)
        found = [
            sampled_hits(model, target, answer, self._plan.temperature, self._plan.draws, seed)
            for seed, answer in enumerate(self._sampled)
        ]
        overlap = [value for one in found for value in one.overlap]
        coupled = [[hit for row in one.coupled for hit in row] for one in found]
        return share_of_hits(coupled), sum(overlap) / len(overlap)

    def _greedy_answers(self, prompts: list[list[int]]) -> list[Answer]:
        path = self._plan.answers
        if path is not None and path.exists():
            return load_answers(path, self._origin(prompts))
        answers = write_answers(self._writer, prompts, self._plan.max_tokens, temperature=0.0)
        if path is not None:
            save_answers(path, answers, self._origin(prompts))
        return answers

    def _origin(self, prompts: list[list[int]]) -> str:
        """Return a hash of everything that determines the greedy answers."""
        model = fingerprint(self._verify.model)
        text = json.dumps([model, prompts, self._plan.max_tokens])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model for its distributions, and the engine that a service would use."""

    engine: Engine
    model: PreTrainedModel
    head_ids: Tensor | None


def _load(name: str, role: Role, device: DeviceSettings) -> _Loaded:
    if name == PROMPT_LOOKUP or is_synthetic(name):
        raise InvalidInputError(f"{name} has no weights to measure: name a real model")
    engine = load_model(name, role, device)
    dtype = getattr(torch, engine.description.dtype)
    return _Loaded(engine, *load_causal_lm(locate_model(name, role), dtype, device.device))


def _num_computed(model: PreTrainedModel) -> int:
    body = {id(weight): weight.numel() for weight in model.parameters()}
    table = model.get_input_embeddings().weight
    body.pop(id(table), None)  # one row of it is read
    head = output_head(model).weight
    return sum((body | {id(head): head.numel()}).values())
