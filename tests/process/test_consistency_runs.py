"""``amusd consistency`` as a process."""

import json
import subprocess
from pathlib import Path

import pytest

from tests import tiny
from tests.process.services import amusd

pytestmark = pytest.mark.process


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return amusd("consistency", *arguments)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    texts = ["one two three", "a b c d", "never mind", "x"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def test_every_strategy_numerics_and_batch_size_is_compared_with_plain_decoding(
    prompts: str, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    models = ["--verify", "synthetic:batch=4", "--draft", "synthetic:agreement=0.7"]
    sizes = ["--max-tokens", "20", "--batch-sizes", "1,6"]
    done = run("--prompts", prompts, *models, *sizes, "--output", str(report))
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert written["num_prompts"] == 4
    assert written["machine"]["processor"]
    found = written["comparisons"]
    assert len(found) == 2 * 3 * 2
    assert {(one["numerics"], one["batch_size"]) for one in found} == {
        (numerics, size) for numerics in ("fast", "exact") for size in (1, 6)
    }
    # There are 4 prompts, so 6 at once ask each of them twice.
    assert all(one["num_outputs"] == (4 if one["batch_size"] == 1 else 8) for one in found)
    assert not any(one["num_differing"] or one["num_fallbacks"] for one in found)


@pytest.mark.slow
def test_in_bfloat16_exact_numerics_write_the_same_with_every_strategy(
    prompts: str, tmp_path: Path
) -> None:
    verify, near = tiny.build("llama"), tiny.perturbed(tiny.build("llama"), 0.05)
    folders = [tiny.save(verify, tmp_path / "verify"), tiny.save(near, tmp_path / "draft")]
    models = ["--verify", folders[0], "--draft", folders[1], "--dtype", "bfloat16"]
    ways = ["--strategies", "speculative:4,amusd", "--batch-sizes", "4", "--max-tokens", "60"]
    report = tmp_path / "report.json"
    done = run("--prompts", prompts, *models, *ways, "--output", str(report))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())["comparisons"]
    exact = [one for one in found if one["numerics"] == "exact"]
    assert len(exact) == 2
    assert not any(one["num_differing"] for one in exact)
    assert not any(one["num_fallbacks"] for one in found)
    # Whether fast numerics differ here depends on the processor; if they do, at a near tie.
    for one in (difference for way in found for difference in way["differences"]):
        assert one["tie"]["num_spacings"] < 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "0"], "cannot read batch sizes '0'"),
        (["--batch-sizes", "two"], "cannot read batch sizes 'two'"),
        (["--numerics", "exactly"], "cannot read numerics 'exactly': use fast,exact"),
        (["--strategies", "guess"], "unknown strategy 'guess'"),
        (["--output", "/nowhere/report.json"], "no folder /nowhere"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_starts(
    prompts: str, arguments: list[str], message: str
) -> None:
    done = run("--prompts", prompts, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
