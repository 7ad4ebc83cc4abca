"""The chances of branches, measured on synthetic models whose chances are known."""

import pytest

from amusd.engine.reference import decode_autoregressive
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from benchmarks.branch_chances import chances, drafted


def test_the_chances_are_those_of_the_draft() -> None:
    verify = SyntheticEngine(SyntheticModel())
    draft = SyntheticEngine(SyntheticModel(agreement=0.6, alternatives=4, second_chance=0.8))
    prompt = [1, 2, 3]
    answer = decode_autoregressive(verify, prompt, 2000)
    found = list(drafted(draft, prompt, answer))
    assert found[0].probability == pytest.approx(0.6)
    measured = chances(found)
    assert measured.num_tokens == 2000
    assert measured.acceptance == pytest.approx(0.6, abs=0.04)
    assert measured.among_next == pytest.approx((0.4, 0.6, 0.7, 0.8), abs=0.06)
    assert draft.num_open == 0
