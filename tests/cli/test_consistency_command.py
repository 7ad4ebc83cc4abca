"""Deliberate differences are found under every strategy, and shown."""

import dataclasses
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amusd.analysis.consistency import Comparison, Tie
from amusd.cli import consistency_command as consistency
from amusd.cli.app import app
from amusd.cli.consistency_command import compare_all, decode_concurrently
from amusd.cli.measure import Sample
from amusd.engine.interface import Numerics
from amusd.prompts import Prompt
from tests.cli.test_measure import statistics

PROMPTS = [Prompt(tokens=(number,)) for number in range(3)]


def text_of(prompt: Prompt) -> tuple[int, ...]:
    return tuple(10 * prompt.tokens[0] + index for index in range(6))


@dataclass
class Writer:
    """Decodes the reference's output with one changed token in one prompt."""

    name: str = "writer"
    wrong_prompt: int = -1
    wrong_index: int = 0

    def run(self, prompt: Prompt, max_tokens: int) -> Sample:
        tokens = list(text_of(prompt)[:max_tokens])
        if prompt.tokens == (self.wrong_prompt,):
            tokens[self.wrong_index] += 100
        return Sample(tuple(tokens), 1.0)


@dataclass
class Crowd:
    """Answers only when ``size`` generations run at the same time."""

    size: int
    name: str = "crowd"
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def run(self, prompt: Prompt, max_tokens: int) -> Sample:
        self.barrier.wait(timeout=30)
        return Sample(text_of(prompt), 1.0)


def compared(*writers: Writer, batch_size: int = 1) -> list[Comparison]:
    reference = [text_of(prompt) for prompt in PROMPTS]
    found = {
        (one.name, batch_size): decode_concurrently(one, PROMPTS, batch_size, 6) for one in writers
    }
    return compare_all(Numerics.FAST, reference, found)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_changed_token_is_found_at_its_index(batch_size: int) -> None:
    same, other = compared(Writer("same"), Writer("other", 2, 4), batch_size=batch_size)
    assert (same.num_outputs, same.differences) == (3, ())
    (difference,) = other.differences
    assert (difference.prompt, difference.index) == (2, 4)
    assert (difference.expected, difference.found) == (24, 124)


@pytest.mark.parametrize("size", [2, 4, 6])
def test_prompts_repeat_to_fill_the_batch(size: int) -> None:
    samples = decode_concurrently(Crowd(size), PROMPTS[:2], size, 6)
    texts = [text_of(prompt) for prompt in PROMPTS[:2]]
    assert [one.tokens for one in samples] == texts * (size // 2)


def test_outputs_without_the_draft_are_counted() -> None:
    lost = Sample(text_of(PROMPTS[0]), 1.0, statistics(fallback_reason="the draft is lost"))
    reference = [text_of(PROMPTS[0])]
    (found,) = compare_all(Numerics.FAST, reference, {("amusd", 1): [lost]})
    assert found.num_fallbacks == 1


def shown(comparisons: Sequence[Comparison], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    consistency.show(comparisons, "title")
    return capsys.readouterr()


def test_the_table_shows_index_and_gap_of_differences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    same, other = compared(Writer("same"), Writer("other", 2, 4))
    (difference,) = other.differences
    near = dataclasses.replace(difference, tie=Tie(-0.125, 0.0625))
    measured = dataclasses.replace(other, differences=(near,), num_fallbacks=1)
    out, err = shown([same, measured], capsys)
    lines = [line.split() for line in out.splitlines()]
    assert ["fast", "same", "1", "0", "of", "3", "-", "-", "-", "-"] in lines
    row = "fast other 1 1 of 3 4 4 0.12 2"
    assert row.split() in lines
    assert "fast, other, batch 1: 1 outputs were decoded without the draft" in err


@pytest.mark.parametrize(("numerics", "code"), [("fast", 0), ("exact", 1), ("fast,exact", 1)])
def test_only_a_difference_with_numerics_exact_is_a_failure(
    numerics: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = [text_of(PROMPTS[0])]
    changed = Sample((1, *reference[0][1:]), 1.0)
    monkeypatch.setattr(consistency, "_decode", lambda *_: (reference, {("amusd", 8): [changed]}))
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    prompts.write_text('{"prompt": "x"}\n')
    models = ["--verify", "synthetic", "--draft", "synthetic"]
    arguments = ["--prompts", str(prompts), "--numerics", numerics, *models]
    done = CliRunner().invoke(app, ["consistency", *arguments, "--output", str(report)])
    assert done.exit_code == code, done.output
    for one in json.loads(report.read_text())["comparisons"]:
        assert (one["num_differing"], one["first_index"]) == (1, 0)
        assert one["differences"][0]["expected"] == reference[0][0]
