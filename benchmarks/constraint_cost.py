"""What a constraint costs: ``python -m benchmarks.constraint_cost``.

It prints the time to compile a constraint, of one mask, and of a pass over proposals that are
rejected and rolled back. The text is an output of the schema below.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from amusd.engine.sampling.constraints import ConstraintCompiler
from amusd.pair import resolve_model
from amusd.sampling.parameters import Constraint, ConstraintKind
from amusd.tokenizer.model_tokenizer import make_tokenizer
from amusd.tokenizer.tokenizer_files import read_tokenizer_files

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "country": {"enum": ["DE", "FR", "US"]},
    },
    "required": ["name", "age", "tags", "country"],
    "additionalProperties": False,
}
_TEXT = '{"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "poetry"], "country": "FR"}'
FORMS = {
    "JSON schema": Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(_SCHEMA)),
    "JSON object": Constraint(ConstraintKind.JSON_OBJECT),
    "regex": Constraint(ConstraintKind.REGEX, r"\{.*\}"),
    "choices": Constraint(ConstraintKind.CHOICES, choices=(_TEXT, *map(str, range(100)))),
}
_NUM_PROPOSED = 8


def main(
    model: Annotated[str, typer.Option(help="Model whose tokenizer is used.")] = "smollm2",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each figure.")] = 20,
) -> None:
    """Measure constraints over the tokens of a model."""
    location = resolve_model(model, "verify")
    tokenizer = make_tokenizer(read_tokenizer_files(location)).tokenizer
    size = tokenizer.get_vocab_size()
    compiler = ConstraintCompiler(location, size, (0,))
    table = Table("constraint", "compile, ms", "mask, µs", f"pass over {_NUM_PROPOSED}, µs")
    try:
        started = time.perf_counter()
        compiler.prepare(Constraint(ConstraintKind.REGEX, "first"))
        start_seconds = time.perf_counter() - started
        for name, form in FORMS.items():
            table.add_row(
                name, *(f"{value:.1f}" for value in _figures(compiler, form, tokenizer, rounds))
            )
    finally:
        compiler.close()
    console = Console()
    console.print(table)
    console.print(f"{model}, {size} tokens; the first constraint takes {start_seconds:.2f} s more")


def _figures(
    compiler: ConstraintCompiler, form: Constraint, tokenizer: Tokenizer, rounds: int
) -> tuple[float, float, float]:
    """Return ms to compile, µs of a mask, and µs of the masks of a pass that is rolled back."""
    compile_ms = _seconds(lambda: compiler.prepare(form)) * 1e3
    ids = tokenizer.encode(_TEXT, add_special_tokens=False).ids
    state, masks, passes = compiler.state(form), list[float](), list[float]()
    for _ in range(rounds):
        for end in range(len(ids)):
            output, pending = ids[:end], ids[end : end + _NUM_PROPOSED]
            masks.append(_seconds(partial(state.masks, output, [])))
            passes.append(_seconds(partial(state.masks, output, pending)))
    return compile_ms, median(masks) * 1e6, median(passes) * 1e6


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
