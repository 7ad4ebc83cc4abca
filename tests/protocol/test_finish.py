"""When an output is over, however its tokens are cut into verdicts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.protocol.finish import FinishReason, FinishRule

STOP = 0

tokens = st.lists(st.integers(0, 9), max_size=30)


@pytest.mark.parametrize(
    ("committed", "num_before", "kept", "reason"),
    [
        ((1, 2), 0, (1, 2), None),
        ((1, 2), 3, (1, 2), FinishReason.LENGTH),
        ((1, 2, 3), 3, (1, 2), FinishReason.LENGTH),
        ((1, STOP, 3), 0, (1, STOP), FinishReason.STOP),
        ((1, STOP), 3, (1, STOP), FinishReason.STOP),
        ((1, 2, STOP), 3, (1, 2), FinishReason.LENGTH),
        ((), 0, (), None),
    ],
)
def test_a_stop_token_is_part_of_the_output_and_what_follows_is_not(
    committed: tuple[int, ...],
    num_before: int,
    kept: tuple[int, ...],
    reason: FinishReason | None,
) -> None:
    rule = FinishRule(max_tokens=5, stop_token_ids=frozenset({STOP}))
    assert rule.cut(committed, num_before) == (kept, reason)


@given(tokens, st.integers(1, 20), st.integers(1, 6))
def test_the_output_is_the_same_however_verdicts_cut_it(
    written: list[int], max_tokens: int, size: int
) -> None:
    rule = FinishRule(max_tokens, frozenset({STOP}))
    output: tuple[int, ...] = ()
    reason = None
    for start in range(0, len(written), size):
        kept, reason = rule.cut(tuple(written[start : start + size]), len(output))
        output += kept
        if reason is not None:
            break
    assert (output, reason) == rule.cut(tuple(written), 0)
