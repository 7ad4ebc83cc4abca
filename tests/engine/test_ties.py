"""How near a tie was."""

from pathlib import Path

import pytest
import torch

from amusd.engine.ties import load_judge
from amusd.prompts import Prompt
from tests import tiny


def test_the_gap_is_that_of_the_models_own_logits(tmp_path: Path) -> None:
    model = tiny.build("llama")
    folder = tiny.save(model, tmp_path)
    judge = load_judge("tiny", folder, "cpu", "float32")
    text = judge.encode(Prompt(tokens=(5, 6, 7)))
    with torch.inference_mode():
        logits = model(torch.tensor([text])).logits[0, -1]
    assert judge.gap(text, 3, 9) == pytest.approx(float(logits[3] - logits[9]), abs=1e-4)
    assert judge.gap(text, 9, 3) == -judge.gap(text, 3, 9)
