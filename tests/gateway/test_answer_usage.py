"""Speculation figures from the statistics of a generation, and fields that errors name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.protocol.errors import InvalidInputError
from amusd.v1 import orchestrator_pb2
from gateway import api_errors
from gateway.usage import Usage, speculation_figures


@given(steps=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=20))
def test_figures_are_those_of_the_steps_of_a_generation(steps: list[tuple[int, int]]) -> None:
    """Each step has a number of proposed tokens, and of those that the verify model agrees with."""
    accepted = [min(proposed, right) for proposed, right in steps]
    compared = [min(one + 1, proposed) for one, (proposed, _) in zip(accepted, steps, strict=True)]
    statistics = orchestrator_pb2.Statistics(
        num_drafted=1_000,
        num_in_passes=sum(proposed for proposed, _ in steps),
        acceptance_per_position=[
            orchestrator_pb2.PositionAcceptance(
                num_checked=sum(number < one for one in compared),
                num_accepted=sum(number < one for one in accepted),
            )
            for number in range(max(compared, default=0))
        ],
    )
    figures = speculation_figures(statistics)
    histogram = figures["acceptance_histogram"]
    assert [accepted.count(number) for number in range(len(histogram))] == histogram
    assert figures["num_spec_steps"] == sum(histogram) == len(steps)
    assert figures["num_accepted_draft_tokens"] == sum(accepted)
    assert figures["num_draft_tokens"] == statistics.num_in_passes
    if steps:
        assert figures["mean_acceptance_length"] == 1 + sum(accepted) / len(steps)
        assert figures["draft_acceptance_rate"] == sum(accepted) / statistics.num_in_passes


def test_completions_of_a_prompt_share_its_tokens() -> None:
    usage = Usage(num_choices=4)
    for prompt in (0, 0, 1, 1):
        usage.add(prompt, orchestrator_pb2.Statistics(num_prompt_tokens=5, num_output_tokens=2))
    assert usage.fields()["prompt_tokens"] == 10
    assert usage.fields()["completion_tokens"] == 8
    assert usage.metrics() is None


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("top_p is 2: use a number above 0, at most 1", "top_p"),
        ("logit_bias of token 5 is 200: use -100 to 100", "logit_bias"),
        ("logit_bias: token id 9 is outside the vocabulary", "logit_bias"),
        ("a text of stop has 2000 bytes: use 1 to 1024", "stop"),
        ("bad_texts has 200 texts: send at most 128", "bad_words"),
        ("logprobs.has_prompt asks for 3 log-probabilities", "logprobs"),
        ("the prompt has 700 tokens, the context 600", None),
        ("model checks failed", "model"),
    ],
)
def test_an_error_names_the_field_that_its_message_begins_with(
    message: str, param: str | None
) -> None:
    assert api_errors.of_error(InvalidInputError(message)).param == param
