"""The benchmark of constraints runs over any tokenizer."""

from pathlib import Path

import pytest

from benchmarks import constraint_cost
from tests.engine.sampling.constraint_tokens import TokenizerFolder


def test_it_prints_a_row_for_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = TokenizerFolder.save(tmp_path)
    constraint_cost.main(str(tokens.folder), rounds=1)
    printed = " ".join(capsys.readouterr().out.split())  # titles wrap
    for name in constraint_cost.FORMS:
        assert name in printed
    assert f"{tokens.size} tokens" in printed
