"""Builds the verify model's folder: SmolLM2-135M-Instruct, dequantised to float32."""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from amusd.pair.cache import ensure_folder
from amusd.pair.checkpoint import Tensors, write_config, write_tokenizer, write_weights
from amusd.pair.source import GGUF_SHA256, SmolLM2Gguf, check_gguf, find_gguf


def ensure_verify(folder: Path, progress: bool) -> Path:
    """Return ``folder``; convert the installed GGUF into it if it is not current.

    ``progress`` draws a bar on standard error if that is a terminal.

    Raises:
        PairError: the weights are missing or damaged, or the folder cannot be written.
    """

    def write(empty: Path) -> None:
        gguf = find_gguf()
        check_gguf(gguf)
        convert(gguf, empty, progress and sys.stderr.isatty())

    return ensure_folder(folder, GGUF_SHA256, write)


def convert(gguf_path: Path, folder: Path, progress: bool) -> None:
    """Convert the model in ``gguf_path`` into the empty ``folder``, in the Hugging Face layout."""
    gguf = SmolLM2Gguf(gguf_path)
    vocabulary = gguf.vocabulary()
    write_config(folder, gguf.shape(), vocabulary)
    write_tokenizer(folder, vocabulary)
    steps = track(
        gguf.tensors(),
        "Converting SmolLM2-135M (once)",
        total=gguf.num_tensors,
        console=Console(stderr=True),
        disable=not progress,
        transient=True,
    )
    tensors: Tensors = dict(steps)
    write_weights(folder, tensors)
