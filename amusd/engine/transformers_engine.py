"""Any causal language model that Transformers loads, one slot cache a session.

Sessions run one after the other here; a shared batch fits behind the same interface.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from amusd.core.errors import InvalidInputError, LimitExceededError
from amusd.core.model import ModelDescription
from amusd.core.vocabulary import Vocabulary
from amusd.engine.interface import Feed
from amusd.engine.reduced_head import load_causal_lm
from amusd.engine.rows import use_rows_kernels
from amusd.engine.slot_cache import SlotCache

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

    max_batch = 1

    def __init__(
        self,
        model: PreTrainedModel,
        description: ModelDescription,
        head_ids: torch.Tensor | None = None,
        num_outputs: int | None = None,
    ) -> None:
        """Serve ``model``; ``load_engine`` is the way to get one.

        Args:
            model: the model, on its device.
            description: what to say about it.
            head_ids: token id of each row of a reduced head, ``[head_rows]``.
            num_outputs: only the first so many rows of the head may come out.
        """
        self._model = model
        self._device = model.device
        self._head_ids = None if head_ids is None else head_ids.to(self._device)
        self._num_outputs = num_outputs
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._slots: dict[int, SlotCache] = {}
        self._next_slot = 0
        self.description = description

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

    def open(self, capacity: int) -> int:
        """Return a new empty slot for at most ``capacity`` tokens."""
        if capacity > self.description.context_length:
            raise LimitExceededError(
                f"{capacity} tokens do not fit the model's context of "
                f"{self.description.context_length}"
            )
        self._next_slot += 1
        self._slots[self._next_slot] = SlotCache(self._num_layers, capacity)
        return self._next_slot

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return self._slots[slot].length

    @torch.inference_mode()
    def run(self, feeds: Sequence[Feed]) -> list[list[int]]:
        """Run each feed through the model; return its greedy tokens."""
        return [self._run_one(feed) for feed in feeds]

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens."""
        self._slots[slot].truncate(length)

    def close(self, slot: int) -> None:
        """Free the slot's keys and values."""
        del self._slots[slot]

    def _run_one(self, feed: Feed) -> list[int]:
        logits = self._logits(feed)
        if feed.num_outputs == 0:
            return []
        if self._num_outputs is not None:
            logits = logits[:, : self._num_outputs]
        tokens = logits.argmax(dim=-1)  # [num_outputs]
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
            self.truncate(slot, _PROBE_TOKENS // 2)
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


def load_engine(source: ModelSource, known_tokens_only: bool = False) -> TransformersEngine:
    """Load a model and its tokenizer's fingerprint, and check that it can be rolled back.

    Args:
        source: what to load.
        known_tokens_only: never answer with an id beyond the tokenizer's (a padded head), as
            a draft must not, for the verify model may not know it.

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
    use_rows_kernels(model)
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
    engine = TransformersEngine(model, description, head_ids, num_outputs)
    engine.check_rollback()
    return engine
