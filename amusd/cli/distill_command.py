"""``amusd distill``: trains a draft model on text that the verify model writes."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from amusd.engine.loading.device import DeviceSettings, prepare_torch
from amusd.engine.loading.model_loading import locate_model
from amusd.pair import SMOLLM2
from amusd.prompts import Prompt, load_prompts
from amusd.protocol.errors import InvalidInputError

if TYPE_CHECKING:
    from amusd.distill.trainer import Report

_ALL = 1 << 30


def distill(
    verify: Annotated[str, typer.Option(help="Verify model: hub id, folder or smollm2.")],
    output: Annotated[
        Path, typer.Option(help="Folder of the draft. An interrupted run resumes from it.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the training data; drafts can share it.", show_default="OUTPUT/data"
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL file of prompts, or text file to continue; repeat the option for several."
        ),
    ] = None,
    made_up: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of prompts that the verify model writes itself."),
    ] = 0.5,
    num_layers: Annotated[
        int, typer.Option(min=1, help="Number of layers of the draft, from the first.")
    ] = 2,
    layers: Annotated[
        str, typer.Option(help="Layers of the draft, as 0,1,29; overrides --num-layers.")
    ] = "",
    draft_vocab: Annotated[
        int, typer.Option(min=0, help="Output head: this many frequent tokens; 0: all tokens.")
    ] = 8192,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of training text.")] = (2_000_000),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training text.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Answers per training step.")] = 16,
    write_batch: Annotated[int, typer.Option(min=1, help="Answers written per batch.")] = 128,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Maximum tokens per answer.")] = 128,
    rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 4e-3,
    target_temperature: Annotated[
        float, typer.Option(min=0.05, help="Temperature of the targets; below 1 sharpens them.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of prompts, sampling and order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ...")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Threads on CPU; 0: PyTorch's choice.")] = 0,
    licence: Annotated[
        str, typer.Option(help="Licence of the verify model, for the model card.")
    ] = "",
    export: Annotated[
        Path | None,
        typer.Option(help="Also write the draft here with the full output head, for Transformers."),
    ] = None,
) -> None:
    """Train a draft model on text that the verify model writes.

    The verify model answers prompts. The draft is made of some of its layers and trained on the
    answers. Progress is saved: run the same command again to resume after an interruption.
    """
    prepare_torch(DeviceSettings(device, "auto", threads))
    chosen = _parse_layers(layers)
    given = tuple(_given_prompts(prompts or []))
    # Transformers takes seconds to import, so arguments are checked first.
    from amusd.distill.distillation import Plan, keep_freed_memory  # noqa: PLC0415
    from amusd.distill.distillation import distill as run  # noqa: PLC0415

    keep_freed_memory()
    plan = Plan(
        verify=verify,
        location=locate_model(verify, "verify"),
        output=output,
        data=data or output / "data",
        prompts=given,
        layers=chosen,
        num_layers=num_layers,
        draft_vocab=draft_vocab,
        num_tokens=tokens,
        epochs=epochs,
        made_up_share=made_up,
        write_rows=write_batch,
        batch_rows=batch,
        answer_tokens=answer_tokens,
        peak_rate=rate,
        target_temperature=target_temperature,
        seed=seed,
        device=device,
        licence=licence or ("apache-2.0" if verify == SMOLLM2 else "other"),
        export=export,
    )
    try:
        with _ProgressBars() as bars:
            result = run(plan, bars)
    except KeyboardInterrupt:
        print("stopped: run the same command again to resume", file=sys.stderr)
        raise
    print(f"{output}: the draft predicts {result.held_out:.1%} of the held-out greedy tokens")
    print(f"amusd serve draft --model {output}")


def _parse_layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InvalidInputError(f"cannot read layers {text!r}: give numbers as 0,1,29") from None


def _given_prompts(sources: list[str]) -> Iterator[Prompt]:
    for source in sources:
        if Path(source).suffix in (".jsonl", "", ".json"):
            yield from load_prompts(source, _ALL)
        else:
            yield from _paragraphs(Path(source))


def _paragraphs(path: Path) -> Iterator[Prompt]:
    """Yield the paragraphs of a text as prompts that the verify model continues."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read {path} ({error}): give a UTF-8 text file") from None
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    if not any(paragraphs):
        raise InvalidInputError(f"{path} has no text")
    for paragraph in filter(None, paragraphs):
        yield Prompt(text=paragraph)


class _ProgressBars:
    """Progress on standard error: bars on a terminal, occasional lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, markup=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._writing: TaskID | None = None
        self._training: TaskID | None = None
        self._held_out = ""

    def __enter__(self) -> "_ProgressBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def wrote(self, num_tokens: int, total: int) -> None:
        """Show how many tokens of training text are written."""
        if self._writing is None:
            self._writing = self._progress.add_task("writing", total=total, note="")
        self._progress.update(self._writing, completed=min(num_tokens, total))
        if not self._console.is_terminal:
            self._console.print(f"written: {num_tokens} of {total} tokens")

    def trained(self, report: "Report", total: int) -> None:
        """Show the progress of training."""
        if self._training is None:
            self._training = self._progress.add_task("training", total=total, note="")
        if report.held_out is not None:
            self._held_out = f", held-out acceptance {report.held_out:.1%}"
        note = f"loss {report.loss:.3f}, acceptance {report.agreement:.1%}{self._held_out}"
        self._progress.update(self._training, completed=report.progress.tokens, note=note)
        if report.held_out is not None and not self._console.is_terminal:
            self._console.print(f"trained: {report.progress.tokens} of {total} tokens, {note}")
