"""Checks at start that a model computes finite logits, before any check compares them."""

import torch

from amusd.engine.loading.model_source import LoadedModel
from amusd.engine.not_finite import likely_cause
from amusd.engine.runners.self_check import MISFITS
from amusd.protocol.errors import InvalidInputError

_NUM_TOKENS = 10


@torch.inference_mode()
def refuse_not_finite(loaded: LoadedModel) -> None:
    """Run a few tokens through a model, alone.

    Raises:
        InvalidInputError: its weights or its logits hold NaN or infinity.
    """
    model, description = loaded.model, loaded.description
    tokens = [i * i % description.output_size for i in range(1, _NUM_TOKENS + 1)]
    try:
        logits = model(
            input_ids=torch.tensor([tokens], device=model.device), use_cache=False
        ).logits  # [1, tokens, head]
    except MISFITS:
        return  # the selection says why the model cannot run
    # A model may mask tokens of its head with -inf.
    if logits.amax(dim=-1).isfinite().all():
        return
    broken = _broken_weight(loaded)
    cause = f"its weight {broken} does" if broken else "its logits do"
    raise InvalidInputError(
        f"{description.name} cannot be served in {description.dtype}: {cause} not stay finite "
        f"(NaN or infinity); {likely_cause(description.dtype)}"
    )


def _broken_weight(loaded: LoadedModel) -> str | None:
    """Return the name of a weight that holds NaN or infinity."""
    for name, weight in loaded.model.named_parameters():
        if not weight.isfinite().all():
            return name
    return None
