"""The embedded pair of models, prepared in the user's cache; no torch and no services here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from amusd.pair.cache import cache_root
from amusd.pair.pair_error import PairError

__all__ = ["SMOLLM2", "EmbeddedPair", "PairError", "ensure_smollm2", "resolve_model"]

SMOLLM2 = "smollm2"


@dataclass(frozen=True, slots=True)
class EmbeddedPair:
    """Folders of a verify model and a draft model that share one tokenizer."""

    verify: Path
    draft: Path


def ensure_smollm2(progress: bool = True) -> EmbeddedPair:
    """Return the folders of SmolLM2-135M-Instruct and of its draft model.

    The first call converts the weights, which takes seconds; later calls check file sizes only.
    ``progress`` draws a bar on standard error if that is a terminal.

    Raises:
        PairError: the weights are not installed, they have another checksum, or the cache cannot
            be written.
    """
    # These load numpy and gguf, which services with other models do not need.
    from amusd.pair.draft_model import ensure_draft  # noqa: PLC0415
    from amusd.pair.verify_model import ensure_verify  # noqa: PLC0415

    folder = cache_root() / SMOLLM2
    verify = ensure_verify(folder / "verify", progress)
    return EmbeddedPair(verify=verify, draft=ensure_draft(folder / "draft", verify))


def resolve_model(name: str, role: Literal["draft", "verify"]) -> str:
    """Return the folder of the embedded model if ``name`` is ``smollm2``, else ``name``.

    Raises:
        PairError: as ``ensure_smollm2``.
    """
    if name != SMOLLM2:
        return name
    pair = ensure_smollm2()
    return str(pair.draft if role == "draft" else pair.verify)
