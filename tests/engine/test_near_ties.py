"""The gap between the logits of two tokens."""

from pathlib import Path

import pytest
import torch

from amusd.engine.near_ties import load_gap_reader, spacing
from amusd.prompts import Prompt
from tests import tiny


def test_the_gap_comes_from_the_logits_of_the_model(tmp_path: Path) -> None:
    model = tiny.build("llama")
    folder = tiny.save(model, tmp_path)
    reader = load_gap_reader("tiny", folder, "cpu", "float32")
    text = reader.encode(Prompt(tokens=(5, 6, 7)))
    with torch.inference_mode():
        logits = model(torch.tensor([text])).logits[0, -1]
    tie = reader.tie(text, 3, 9)
    assert tie.gap == pytest.approx(float(logits[3] - logits[9]), abs=1e-4)
    assert reader.tie(text, 9, 3).gap == -tie.gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.7, 1.0, 13.4, -13.4, 16.0])
def test_the_spacing_is_the_distance_to_the_next_number(value: float, dtype: torch.dtype) -> None:
    number = torch.tensor(abs(value), dtype=dtype)
    following = torch.nextafter(number, torch.tensor(torch.inf, dtype=dtype))
    assert spacing(float(number), dtype) == float(following) - float(number)


def test_the_spacing_of_zero_is_positive() -> None:
    assert spacing(0.0, torch.float32) > 0
