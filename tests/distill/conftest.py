"""A tiny verify model on disk, and a plan to distill it."""

from pathlib import Path

import pytest
import torch

from amusd.distill.distillation import Plan
from amusd.distill.trainer import Report
from amusd.distill.writer import TextWriter
from amusd.engine.loading.reduced_head import load_causal_lm
from amusd.prompts import Prompt
from tests import tiny


@pytest.fixture(scope="session")
def verify_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill") / "verify"
    tiny.save(tiny.build("llama"), folder)
    return folder


@pytest.fixture
def writer(verify_folder: Path) -> TextWriter:
    model, _ = load_causal_lm(str(verify_folder), torch.float32, "cpu")
    return TextWriter(model, stop_ids=[], top_k=8)


@pytest.fixture
def plan(verify_folder: Path, tmp_path: Path) -> Plan:
    output = tmp_path / "draft"
    return Plan(
        verify=str(verify_folder),
        location=str(verify_folder),
        output=output,
        data=output / "data",
        prompts=(Prompt(text="one"), Prompt(text="two and three")),
        layers=(),
        num_layers=1,
        draft_vocab=64,
        num_tokens=400,
        epochs=2,
        write_rows=8,
        batch_rows=4,
        answer_tokens=12,
        top_k=8,
    )


class Watched:
    """A watcher that records its calls and can interrupt the run."""

    def __init__(self, stop_after_writes: int = -1, stop_after_reports: int = -1) -> None:
        self.writes: list[int] = []
        self.reports: list[Report] = []
        self._stop_after_writes = stop_after_writes
        self._stop_after_reports = stop_after_reports

    def wrote(self, num_tokens: int, total: int) -> None:
        self.writes.append(num_tokens)
        if len(self.writes) == self._stop_after_writes:
            raise KeyboardInterrupt

    def trained(self, report: Report, total: int) -> None:
        self.reports.append(report)
        if len(self.reports) == self._stop_after_reports:
            raise KeyboardInterrupt
