"""Baselines: plain and assisted generation by Transformers."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from amusd.cli.local_services import Placement
from amusd.cli.measure import Runner, Sample
from amusd.engine.loading.device import DeviceSettings, bind_engine_thread, prepare_torch
from amusd.engine.loading.end_of_text import end_of_text
from amusd.engine.loading.generation_settings import use_plain_greedy
from amusd.engine.loading.model_files import read_model_files
from amusd.engine.loading.reduced_head import load_causal_lm
from amusd.fleet.model_description import PROMPT_LOOKUP, is_synthetic
from amusd.pair import resolve_model
from amusd.prompts import Prompt, encode
from amusd.protocol.errors import InvalidInputError

_LOOKUP_TOKENS = 10  # the value in the documentation of Transformers


@dataclass(frozen=True, slots=True)
class TransformersRunner:
    """Greedy ``generate()`` of Transformers with extra options."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    options: dict[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def run(self, prompt: Prompt, max_tokens: int) -> Sample:
        """Decode one prompt."""
        started = time.perf_counter()
        ids = torch.tensor([encode(prompt, self.tokenizer)], device=self.model.device)
        output = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            **self.options,
        )
        tokens = tuple(int(token) for token in output[0, ids.shape[1] :].tolist())
        return Sample(tokens, time.perf_counter() - started)


def transformers_runners(draft: str, verify: str, placement: Placement) -> Iterator[Runner]:
    """Yield plain generation, and assisted generation if there is a draft.

    They run on the calling thread, on the cores and with the threads of the verify service. Like
    the services they use float32 on CPU and bfloat16 on other devices, decode plainly whatever the
    model's generation settings say, and end at the same tokens.

    Raises:
        InvalidInputError: the verify model is synthetic; Transformers cannot run it.
    """
    if is_synthetic(verify):
        raise InvalidInputError("Transformers cannot run a synthetic model: name a real one")
    device = DeviceSettings(placement.device, "auto", placement.threads, placement.cpus)
    bind_engine_thread(device)
    prepare_torch(device)
    dtype = torch.float32 if placement.device == "cpu" else torch.bfloat16
    location = resolve_model(verify, "verify")
    model, _ = load_causal_lm(location, dtype, torch.device(placement.device))
    output_size = int(model.config.get_text_config().vocab_size)
    use_plain_greedy(model, end_of_text(read_model_files(location), output_size).token_ids)
    tokenizer = AutoTokenizer.from_pretrained(location)
    yield TransformersRunner("transformers", model, tokenizer)
    if draft == PROMPT_LOOKUP:
        options: dict[str, Any] = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}
        yield TransformersRunner("transformers-assisted", model, tokenizer, options)
    elif draft and not is_synthetic(draft):
        assistant = _assistant(draft, dtype, placement.device)
        options = {"assistant_model": assistant}
        yield TransformersRunner("transformers-assisted", model, tokenizer, options)


class _ScatteredHead(torch.nn.Module):
    """A reduced head in the form that Transformers needs: one logit per token of the vocabulary."""

    def __init__(self, head: torch.nn.Module, head_ids: torch.Tensor, vocab_size: int) -> None:
        super().__init__()
        self._head = head
        self._head_ids = head_ids
        self._vocab_size = vocab_size

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., hidden] -> [..., vocab]
        reduced: torch.Tensor = self._head(hidden)
        full = reduced.new_full((*reduced.shape[:-1], self._vocab_size), -torch.inf)
        full[..., self._head_ids] = reduced
        return full


def _assistant(draft: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    model, head_ids = load_causal_lm(resolve_model(draft, "draft"), dtype, torch.device(device))
    if head_ids is not None:
        model.lm_head = _ScatteredHead(model.lm_head, head_ids, model.config.vocab_size)
    return model
