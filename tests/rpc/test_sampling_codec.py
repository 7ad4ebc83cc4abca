"""Sampling to messages and back, and messages that are refused."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.protocol.errors import InvalidInputError
from amusd.rpc import sampling_codec as codec
from amusd.sampling.parameters import (
    Constraint,
    ConstraintKind,
    LogprobsOptions,
    SamplingParameters,
    SequenceSampling,
    TokenLogprobs,
)
from amusd.v1 import draft_pb2, sampling_pb2, verify_pb2

TOKENS = st.integers(0, 2**32 - 1)


def floats(least: float, most: float, exclude_min: bool = False) -> st.SearchStrategy[float]:
    return st.floats(least, most, width=32, exclude_min=exclude_min)


CONSTRAINTS = st.one_of(
    st.builds(
        Constraint,
        st.sampled_from([ConstraintKind.JSON_SCHEMA, ConstraintKind.REGEX, ConstraintKind.GRAMMAR]),
        st.text(min_size=1),
    ),
    st.just(Constraint(ConstraintKind.JSON_OBJECT)),
    st.builds(
        lambda texts: Constraint(ConstraintKind.CHOICES, choices=tuple(texts)),
        st.lists(st.text(min_size=1), min_size=1),
    ),
)


@st.composite
def parameters(draw: st.DrawFn) -> SamplingParameters:
    temperature = draw(st.just(0.0) | floats(0.125, 100.0))
    return SamplingParameters(
        temperature=temperature,
        top_k=draw(st.integers(0, 2**31 - 1)),
        top_p=draw(floats(0.0, 1.0, exclude_min=True)),
        min_p=draw(floats(0.0, 1.0)),
        repetition_penalty=draw(floats(0.125, 100.0)),
        presence_penalty=draw(floats(-2.0, 2.0)),
        frequency_penalty=draw(floats(-2.0, 2.0)),
        no_repeat_ngram_size=draw(st.integers(0, 64)),
        logit_bias=tuple(sorted(draw(st.dictionaries(TOKENS, floats(-100.0, 100.0))).items())),
        allowed_token_ids=tuple(sorted(draw(st.sets(TOKENS)))),
        bad_words=tuple(
            draw(st.lists(st.lists(TOKENS, min_size=1, max_size=5).map(tuple), max_size=3))
        ),
        seed=draw(st.integers(0, 2**64 - 1)) if temperature else 0,
        constraint=draw(st.none() | CONSTRAINTS),
    )


@given(parameters())
def test_sampling_parameters_survive_a_round_trip(given: SamplingParameters) -> None:
    sent = codec.sampling_to_proto(given).SerializeToString()
    assert codec.sampling_from_proto(sampling_pb2.Sampling.FromString(sent)) == given


def test_an_empty_message_is_greedy_decoding() -> None:
    assert codec.sampling_from_proto(sampling_pb2.Sampling()) == SamplingParameters()


@given(st.dictionaries(TOKENS, floats(-1.0, 1.0)), st.lists(TOKENS), st.randoms())
def test_the_order_of_biases_and_allowed_tokens_is_irrelevant(
    biases: dict[int, float], allowed: list[int], random: Any
) -> None:
    items, others = list(biases.items()), [*allowed, *allowed]
    random.shuffle(items)
    random.shuffle(others)
    first = sampling_pb2.Sampling(logit_bias=biases, allowed_token_ids=allowed)
    second = sampling_pb2.Sampling(logit_bias=dict(items), allowed_token_ids=others)
    assert codec.sampling_from_proto(first) == codec.sampling_from_proto(second)


def test_bounds_are_allowed_though_a_float32_is_a_little_below_them() -> None:
    bounds = codec.sampling_from_proto(
        sampling_pb2.Sampling(temperature=0.01, repetition_penalty=0.01, seed=1)
    )
    assert bounds.temperature == pytest.approx(0.01)


def test_a_top_k_over_an_int32_means_the_same_as_its_largest() -> None:
    assert codec.sampling_from_proto(sampling_pb2.Sampling(top_k=2**32 - 1)).top_k == 2**31 - 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": -0.5}, "temperature is -0.5: use 0 or 0.01 to 100"),
    "a tiny temperature": ({"temperature": 1e-30}, "temperature is 1e-30"),
    "a large temperature": ({"temperature": 101}, "temperature is 101"),
    "top_p": ({"top_p": 0.0}, "top_p is 0: use a number above 0, at most 1"),
    "a large top_p": ({"top_p": 1.5}, "top_p is 1.5"),
    "min_p": ({"min_p": -1e-9}, "min_p is -1e-09: use 0 to 1"),
    "repetition_penalty": ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
    "presence_penalty": ({"presence_penalty": 2.5}, "presence_penalty is 2.5: use -2 to 2"),
    "frequency_penalty": ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
    "no_repeat_ngram_size": (
        {"no_repeat_ngram_size": 2**32 - 1},
        "no_repeat_ngram_size is 4294967295: use 1 to 64, or 0 for none",
    ),
    "logit_bias": ({"logit_bias": {7: 100.5}}, "logit_bias of token 7 is 100.5"),
    "many biases": (
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        "logit_bias has 1025 entries: send at most 1024",
    ),
    "many allowed tokens": (
        {"allowed_token_ids": [1] * 65537},
        "allowed_token_ids has 65537 entries",
    ),
    "many bad words": (
        {"bad_words": [sampling_pb2.TokenSequence(ids=[1])] * 1025},
        "bad_words has 1025 entries",
    ),
    "an empty bad word": ({"bad_words": [sampling_pb2.TokenSequence()]}, "1 to 64 tokens"),
    "a long bad word": (
        {"bad_words": [sampling_pb2.TokenSequence(ids=[1] * 65)]},
        "1 to 64 tokens",
    ),
    "a constraint without form": (
        {"constraint": sampling_pb2.Constraint()},
        "the constraint has no form: set one of json_schema, json_object, regex, choices, grammar",
    ),
    "json_object of false": (
        {"constraint": sampling_pb2.Constraint(json_object=False)},
        "constraint.json_object is false",
    ),
    "an empty regex": ({"constraint": sampling_pb2.Constraint(regex="")}, "regex is empty"),
    "no choice": (
        {"constraint": sampling_pb2.Constraint(choices=sampling_pb2.Choices())},
        "at least one text",
    ),
    "a long grammar": (
        {"constraint": sampling_pb2.Constraint(grammar="x" * (256 * 1024 + 1))},
        "262145 bytes",
    ),
    "no seed": ({"temperature": 1.0, "seed": None}, "sampling.seed is unset"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_message_out_of_range_is_refused_by_the_name_of_its_field(case: str) -> None:
    fields, words = REFUSED[case]
    with pytest.raises(InvalidInputError) as caught:
        codec.sampling_from_proto(sampling_pb2.Sampling(**({"seed": 1} | fields)))
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
    ],
)
def test_what_is_no_finite_number_is_refused(name: str, value: float) -> None:
    message = sampling_pb2.Sampling(seed=1)
    if name == "logit_bias":
        message.logit_bias[3] = value
    else:
        setattr(message, name, value)
    with pytest.raises(InvalidInputError, match=name):
        codec.sampling_from_proto(message)


@pytest.mark.parametrize(
    ("temperature", "sent", "seed"), [(0.0, 5, 0), (0.0, None, 0), (1.0, 0, 0), (1.0, None, 9)]
)
def test_only_sampling_has_a_seed(temperature: float, sent: int | None, seed: int) -> None:
    message = sampling_pb2.Sampling(temperature=temperature, seed=sent)
    assert codec.sampling_from_proto(message, default_seed=9).seed == seed


# Openings


@given(
    sampling=parameters(),
    num_prompt=st.integers(1, 8),
    min_position=st.integers(0, 99),
    banned=st.sets(TOKENS),
    logprobs=st.none()
    | st.builds(LogprobsOptions, st.integers(0, 20), st.booleans(), st.booleans()),
)
def test_an_opening_keeps_the_sampling_of_its_session(
    sampling: SamplingParameters,
    num_prompt: int,
    min_position: int,
    banned: set[int],
    logprobs: LogprobsOptions | None,
) -> None:
    given = SequenceSampling(
        sampling, num_prompt, min_position, tuple(sorted(banned)), logprobs=logprobs
    )
    opening = verify_pb2.VerifyOpen(
        token_ids=range(8),
        sampling=codec.sampling_to_proto(sampling),
        context=codec.context_to_proto(given),
        logprobs=codec.options_to_proto(logprobs),
    )
    assert codec.sequence_sampling_from_proto(opening) == given


@pytest.mark.parametrize("kind", [draft_pb2.ProposeOpen, verify_pb2.VerifyOpen])
def test_an_opening_without_sampling_is_greedy_behind_all_its_tokens(
    kind: type[draft_pb2.ProposeOpen] | type[verify_pb2.VerifyOpen],
) -> None:
    found = codec.sequence_sampling_from_proto(kind(token_ids=[1, 2, 3]))
    assert found == SequenceSampling(num_prompt_tokens=3)
    assert found.is_plain


@pytest.mark.parametrize(
    ("opening", "words"),
    [
        (
            verify_pb2.VerifyOpen(
                token_ids=[1, 2], context=sampling_pb2.SequenceContext(num_prompt_tokens=3)
            ),
            "context.num_prompt_tokens is 3: the session is opened with 2 tokens",
        ),
        (
            verify_pb2.VerifyOpen(
                token_ids=[1, 2], sampling=sampling_pb2.Sampling(temperature=0.5)
            ),
            "sampling.seed is unset",
        ),
        (
            verify_pb2.VerifyOpen(logprobs=sampling_pb2.LogprobsOptions(num_top=21)),
            "num_top is 21: use 0 to 20",
        ),
        (
            draft_pb2.ProposeOpen(
                context=sampling_pb2.SequenceContext(banned_token_ids=[1] * 65537)
            ),
            "context.banned_token_ids has 65537 entries",
        ),
    ],
)
def test_an_opening_that_contradicts_itself_is_refused(
    opening: draft_pb2.ProposeOpen | verify_pb2.VerifyOpen, words: str
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        codec.sequence_sampling_from_proto(opening)


LOGPROBS = floats(-1000.0, 0.0) | st.just(-math.inf)


@given(
    st.lists(
        st.builds(
            TokenLogprobs,
            TOKENS,
            LOGPROBS,
            st.lists(st.tuples(TOKENS, LOGPROBS), max_size=20).map(tuple),
        )
    )
)
def test_log_probabilities_survive_a_round_trip(given: list[TokenLogprobs]) -> None:
    assert codec.logprobs_from_proto(codec.logprobs_to_proto(given)) == tuple(given)
