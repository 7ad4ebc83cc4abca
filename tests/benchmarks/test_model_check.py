"""The check of the performance model against reports of the grid."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from amusd.engine.synthetic import SyntheticModel
from amusd.performance.agreement import RIGHT, WRONG
from amusd.protocol.errors import InvalidInputError
from benchmarks.model_check import (
    MeasuredRun,
    SyntheticAgreement,
    fit_message_seconds,
    load_cells,
)

RUN = MeasuredRun(
    agreement=0.75,
    ratio=0.2,
    latency_seconds=0.0,
    alternatives=0,
    num_prompts=1,
    strategy="speculative:2",
    num_tokens=60,
    seconds_per_token=1.0,
    first_token_seconds=0.012,
    pass_seconds=0.0085,
    draft_seconds=0.002,
)


def report(**changes: object) -> str:
    """Return a report with one run of 20 tokens in 160 ms: 10 passes and 16 draft steps."""
    run = {
        "strategy": "speculative:2",
        "tokens": 20,
        "ms_per_token": 8,
        "drafted": 16,
        "time_to_first_token_ms": 12,
        "verify_busy": 0.5,
        "passes": 10,
        "draft_busy": 0.2,
    }
    cell = {"agreement": 0.75, "ratio": 0.2, "pass_ms": 8.0, "latency_ms": 3.0, "runs": [run]}
    return json.dumps({"num_prompts": 2, "alternatives": 0, "cells": [cell], **changes})


def test_the_fit_finds_the_time_of_a_message() -> None:
    measured = replace(RUN, seconds_per_token=RUN.simulate(0.0007))
    assert fit_message_seconds([measured]) == pytest.approx(0.0007, abs=0.00015)


def test_step_times_come_from_the_report(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    path.write_text(report())
    ((found,),) = load_cells(path)
    assert found.pass_seconds == pytest.approx(0.5 * 0.16 / 10)
    assert found.draft_seconds == pytest.approx(0.2 * 0.16 / 16)
    assert found.first_token_seconds == pytest.approx(0.012)
    assert found.latency_seconds == pytest.approx(0.003)


def test_the_start_of_a_request_counts_once() -> None:
    """What the first token takes beyond its pass is added to the simulated time."""
    later = replace(RUN, first_token_seconds=RUN.first_token_seconds + 0.06)
    assert later.simulate(0.0) - RUN.simulate(0.0) == pytest.approx(0.06 / 60)


def test_texts_are_those_of_the_synthetic_models() -> None:
    draft = SyntheticModel(vocabulary=4096, agreement=0.6, alternatives=4)
    text = SyntheticAgreement(draft, (0, 1), 400)
    drafted = [text.draft_token(position, 0) for position in range(1, 401)]
    assert drafted.count(RIGHT) == pytest.approx(240, abs=40)
    ranks = [
        text.next_best(position, 0).index(RIGHT)
        for position in range(1, 401)
        if RIGHT in text.next_best(position, 0)
    ]
    assert len(ranks) == pytest.approx(0.8 * drafted.count(WRONG), abs=30)
    assert ranks.count(0) > ranks.count(1) > ranks.count(2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no report of the grid"),
        ("[]", "no report of the grid"),
        (report(cells=[{"runs": [], "pass_ms": 8}]), "no report of the grid"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "grid.json"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=words):
        load_cells(path)
    with pytest.raises(InvalidInputError, match="cannot read"):
        load_cells(tmp_path / "missing.json")
