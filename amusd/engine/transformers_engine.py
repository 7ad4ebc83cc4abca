"""Any causal language model that Transformers loads, one slot cache a session.

Sessions share a pass where the model's attention is the plain causal one; others take turns.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from amusd.core.errors import InvalidInputError
from amusd.core.model import CacheUsage, ModelDescription
from amusd.core.vocabulary import Vocabulary
from amusd.engine.interface import DEFAULT_OPTIONS, EngineOptions, Feed
from amusd.engine.memory import free_bytes
from amusd.engine.packed import ATTENTION, PackedCache
from amusd.engine.reduced_head import load_causal_lm
from amusd.engine.slot_cache import SlotCache
from amusd.engine.slot_memory import SlotMemory

_PROBE_TOKENS = 6
_NO_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to load and how: a hub id or folder, and the device and number format."""

    name: str
    location: str
    device: str = "cpu"
    dtype: str = "auto"

    def torch_dtype(self) -> torch.dtype:
        """Return the number format; ``auto`` is float32 on CPU and bfloat16 elsewhere."""
        name = self.dtype
        if name == "auto":
            name = "float32" if self.device == "cpu" else "bfloat16"
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InvalidInputError(
                f"unknown dtype {self.dtype!r}: use auto, float32, bfloat16 or float16"
            )
        return dtype


class TransformersEngine:
    """Greedy passes of a Transformers model over slots of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        description: ModelDescription,
        head_ids: torch.Tensor | None = None,
        num_outputs: int | None = None,
        options: EngineOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Serve ``model``; ``load_engine`` is the way to get one.

        Args:
            model: the model, on its device.
            description: what to say about it.
            head_ids: token id of each row of a reduced head, ``[head_rows]``.
            num_outputs: only the first so many rows of the head may come out.
            options: how to run it; passes are shared only after ``share_passes``.
        """
        self._model = model
        self._device = model.device
        self._head_ids = None if head_ids is None else head_ids.to(self._device)
        self._num_outputs = num_outputs
        self.description = description
        self.max_batch = 1
        num_layers = int(model.config.get_text_config().num_hidden_layers)
        cache_bytes = options.cache_mib << 20 or free_bytes(description.device) // 2
        self._slots = SlotMemory(
            max(1, cache_bytes // _bytes_per_token(model)),
            description.context_length,
            make=lambda capacity: SlotCache(num_layers, capacity),
            copy=_copy_rows if options.reuse_prefixes else None,
        )

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, for what needs more than greedy tokens."""
        return self._model

    @property
    def head_ids(self) -> torch.Tensor | None:
        """Token id of each row of a reduced head, ``[head_rows]``."""
        return self._head_ids

    @property
    def num_open(self) -> int:
        """Number of open slots."""
        return len(self._slots)

    @property
    def usage(self) -> CacheUsage:
        """How much memory for keys and values is in use."""
        return self._slots.usage

    def open(self, capacity: int) -> int:
        """Return a new empty slot for at most ``capacity`` tokens."""
        return self._slots.open(capacity)

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return self._slots.length(slot)

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Take over what another slot holds of the beginning of ``tokens``, but the last one."""
        return self._slots.reuse(slot, tokens)

    @torch.inference_mode()
    def run(self, feeds: Sequence[Feed]) -> list[list[int]]:
        """Run the feeds through the model; return the greedy tokens of each."""
        for feed in feeds:
            self._slots.extend(feed.slot, feed.tokens, feed.is_prompt)
        if self.max_batch > 1:
            return self._run_packed(feeds)
        return [self._tokens(self._logits(feed))[: feed.num_outputs] for feed in feeds]

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens."""
        self._slots[slot].truncate(length)
        self._slots.truncate(slot, length)

    def close(self, slot: int) -> None:
        """Free the slot's keys and values."""
        self._slots.close(slot)

    def _run_packed(self, feeds: Sequence[Feed]) -> list[list[int]]:
        """Run all feeds in one pass."""
        sizes = [len(feed.tokens) for feed in feeds]
        slots = [self._slots[feed.slot] for feed in feeds]
        starts = [slot.length for slot in slots]
        ends = list(itertools.accumulate(sizes))
        # Without an output there is still one row, for some models refuse to make none.
        wanted = [
            row
            for end, feed in zip(ends, feeds, strict=True)
            for row in range(end - feed.num_outputs, end)
        ] or [ends[-1] - 1]
        positions = [
            position
            for start, size in zip(starts, sizes, strict=True)
            for position in range(start, start + size)
        ]
        cache = PackedCache(slots, sizes)
        output = self._model(
            input_ids=self._ids([token for feed in feeds for token in feed.tokens]),
            position_ids=self._ids(positions),
            past_key_values=cache,
            packed=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(wanted, device=self._device),
        )
        tokens = iter(self._tokens(output.logits[0]))
        return [list(itertools.islice(tokens, feed.num_outputs)) for feed in feeds]

    def _ids(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(numbers)], device=self._device)

    def _tokens(self, logits: torch.Tensor) -> list[int]:
        """Return the greedy token of each row of logits, ``[rows, head]``."""
        if self._num_outputs is not None:
            logits = logits[:, : self._num_outputs]
        tokens = logits.argmax(dim=-1)  # [rows]
        if self._head_ids is not None:
            tokens = self._head_ids[tokens]
        return [int(token) for token in tokens.tolist()]

    def _logits(self, feed: Feed) -> torch.Tensor:
        """Return the logits after the last ``max(1, num_outputs)`` tokens, ``[rows, head]``."""
        output = self._model(
            input_ids=torch.tensor([list(feed.tokens)], device=self._device),
            past_key_values=self._slots[feed.slot],
            use_cache=True,
            logits_to_keep=max(1, feed.num_outputs),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def check_rollback(self) -> None:
        """Raise InvalidInputError if the model's answer changes after a rollback.

        Architectures with a recurrent state cannot be brought back to an earlier position.
        """
        tokens = [token % self.description.output_size for token in range(1, _PROBE_TOKENS + 1)]
        slot = self.open(_PROBE_TOKENS)
        try:
            before = self._logits(Feed(slot, tokens, _PROBE_TOKENS))
            self._slots[slot].truncate(_PROBE_TOKENS // 2)
            rest = tokens[_PROBE_TOKENS // 2 :]
            after = self._logits(Feed(slot, rest, len(rest)))
            same = torch.allclose(before[-len(rest) :], after, rtol=0.05, atol=0.05)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"{self.description.name} cannot be served: its cache is of a kind that cannot "
                f"be rolled back ({type(error).__name__}: {error})"
            ) from error
        finally:
            self.close(slot)
        if not same:
            raise InvalidInputError(
                f"{self.description.name} cannot be served: it answers differently after its "
                "cache is rolled back (recurrent state?); choose a model with full attention"
            )

    @torch.inference_mode()
    def share_passes(self, max_batch: int) -> bool:
        """Run up to ``max_batch`` slots in one pass from now on, if the model can; say whether.

        Models with plain causal attention can. A probe decides: two slots of different lengths,
        one of them rolled back, answer together what each answers alone.
        """
        before = self._model.config._attn_implementation
        if max_batch == 1 or before != "sdpa" or _sees_a_window(self._model):
            return False
        known = self.description.output_size
        texts = [[i * 7 % known for i in range(1, n + 1)] for n in (5, 9)]
        alone = [self._probe_alone(tokens) for tokens in texts]
        try:
            self._model.set_attn_implementation(ATTENTION)
            self.max_batch = max_batch
            together = self._probe_together(texts)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            together = []
        if together == alone:
            return True
        self._model.set_attn_implementation(before)
        self.max_batch = 1
        return False

    def _probe_alone(self, tokens: list[int]) -> list[int]:
        slot = self.open(len(tokens))
        try:
            return self.run([Feed(slot, tokens, num_outputs=1)])[0]
        finally:
            self.close(slot)

    def _probe_together(self, texts: list[list[int]]) -> list[list[int]]:
        slots = [self.open(len(tokens)) for tokens in texts]
        try:
            begun = [
                Feed(slot, text[:4], num_outputs=0) for slot, text in zip(slots, texts, strict=True)
            ]
            self.run(begun)
            self.truncate(slots[1], 2)
            return self.run(
                [
                    Feed(slot, text[self.length(slot) :], num_outputs=1)
                    for slot, text in zip(slots, texts, strict=True)
                ]
            )
        finally:
            for slot in slots:
                self.close(slot)


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Return what keys and values of one token take in all layers."""
    config = model.config.get_text_config()
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    return int(config.num_hidden_layers) * 2 * num_kv_heads * head_dim * model.dtype.itemsize


def _copy_rows(donor: SlotCache, target: SlotCache, length: int) -> None:
    with torch.inference_mode():
        target.copy_rows(donor, length)


def _sees_a_window(model: PreTrainedModel) -> bool:
    """Whether some layer attends to less than all tokens before."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def load_engine(
    source: ModelSource,
    known_tokens_only: bool = False,
    options: EngineOptions = DEFAULT_OPTIONS,
) -> TransformersEngine:
    """Load a model and its tokenizer's fingerprint, and check that it can be rolled back.

    Args:
        source: what to load.
        known_tokens_only: never answer with an id beyond the tokenizer's (a padded head), as
            a draft must not, for the verify model may not know it.
        options: how to run it.

    Raises:
        InvalidInputError: the model is not there, cannot be loaded, or cannot be rolled back.
    """
    dtype = source.torch_dtype()
    folder = Path(source.location)
    if (folder.is_absolute() or source.location.startswith(".")) and not folder.is_dir():
        raise InvalidInputError(
            f"there is no model folder {source.location}: give one with config.json, safetensors "
            "and a tokenizer, or a hub id"
        )
    # The log of a service is no terminal.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        device = torch.device(source.device)
        model, head_ids = load_causal_lm(source.location, dtype, device)
        tokenizer = AutoTokenizer.from_pretrained(source.location)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise InvalidInputError(
            f"cannot load model {source.name!r} on {source.device}: "
            f"{reason[0] if reason else type(error).__name__}; give a folder with config.json, "
            "safetensors and a tokenizer, or a hub id that can be reached"
        ) from error
    vocabulary = Vocabulary.of(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    config = model.config.get_text_config()
    eos = model.generation_config.eos_token_id if model.generation_config else None
    description = ModelDescription(
        name=source.name,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        # Models without positions of their own (recurrent ones) have no limit to name.
        context_length=int(getattr(config, "max_position_embeddings", _NO_LIMIT)),
        output_size=int(config.vocab_size),
        vocabulary=vocabulary,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [eos] if eos is not None else []),
        tokenizer=source.name,
    )
    num_outputs = len(tokenizer) if known_tokens_only and head_ids is None else None
    engine = TransformersEngine(model, description, head_ids, num_outputs, options)
    engine.check_rollback()
    engine.share_passes(options.max_batch)
    return engine
