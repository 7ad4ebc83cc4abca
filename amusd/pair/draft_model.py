"""Builds the draft model's folder from the trained layers in this package's assets.

The asset holds the trained weights, which are the layers and the final norm in float16, and the ids
of the tokens in the reduced head. Embedding, head rows and tokenizer are the verify model's.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from amusd.pair.cache import ensure_folder, sha256_of
from amusd.pair.checkpoint import HEAD_IDS_NAME, Tensors, TokenIds, write_reduced_head_folder

ASSET_PATH = Path(__file__).with_name("assets") / "smollm2-draft.safetensors"


def ensure_draft(folder: Path, verify: Path, asset: Path = ASSET_PATH) -> Path:
    """Return ``folder``; build it from ``asset`` and the folder ``verify`` if it is not current.

    Raises:
        PairError: it cannot be built.
    """

    def write(empty: Path) -> None:
        body = load_file(asset)
        head_token_ids = body.pop(HEAD_IDS_NAME)
        write_reduced_head_folder(empty, verify, body, head_token_ids)

    return ensure_folder(folder, sha256_of(asset), write)


def save_asset(path: Path, body: Tensors, head_token_ids: TokenIds) -> None:
    """Write an asset for ``ensure_draft``: layers as float16, token ids as int32."""
    tensors = {name: tensor.astype(np.float16) for name, tensor in body.items()}
    tensors[HEAD_IDS_NAME] = head_token_ids.astype(np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    path.chmod(0o644)
