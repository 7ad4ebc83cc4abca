"""Masks of one sequence: what may follow an output that grows and is rolled back."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.sampling.constraint_grammar import Mask
from amusd.engine.sampling.constraints import ConstraintCompiler
from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import Constraint, ConstraintKind
from tests.engine.sampling.constraint_tokens import (
    TokenizerFolder,
    allowed,
    grammar,
    ids_of,
    regex,
    schema,
)

FORMS = (
    regex("(ab|a{2,9}|[0-9]+x)*"),
    schema({"type": "object", "properties": {"a": {"type": "array", "items": {}}}}),
    grammar('start: "a" inner "z" | "1" start\ninner: /[a-y]{0,4}/ | "{" inner "}"'),
    Constraint(ConstraintKind.CHOICES, choices=("aab", "aa", "12ab", "tru", "true")),
)


def test_only_the_end_follows_a_complete_output_and_only_then(
    compiler: ConstraintCompiler, tokens: TokenizerFolder
) -> None:
    state = compiler.state(regex("ab?"))
    a, ab, b = tokens.id("a"), tokens.id("ab"), tokens.id("b")
    assert allowed(state) == {a, ab}
    assert allowed(state, [a]) == {b, *tokens.ends}
    assert allowed(state, [ab]) == set(tokens.ends)
    assert allowed(state, [a, b]) == set(tokens.ends)


def test_behind_an_end_only_ends_follow(
    compiler: ConstraintCompiler, tokens: TokenizerFolder
) -> None:
    state = compiler.state(regex("a*"))
    a, (end, other) = tokens.id("a"), tokens.ends
    masks = state.masks([a], [end, other, a, end])
    assert [ids_of(mask) for mask in masks[1:]] == [{end, other}] * 4
    assert a in allowed(state, [a, a])
    assert ids_of(masks[0]) >= {a, end, other}


def test_masks_of_proposals_stop_at_one_that_is_not_allowed(
    compiler: ConstraintCompiler, tokens: TokenizerFolder
) -> None:
    state = compiler.state(regex("abc*"))
    a, b, c = tokens.ids("acb")[0], tokens.id("b"), tokens.id("c")
    masks = [ids_of(mask) for mask in state.masks([a], [b, a, c])]
    assert masks == [{b}, {c, *tokens.ends}, {c, *tokens.ends}, {c, *tokens.ends}]


@pytest.mark.parametrize("token", [-1, 10_000_000])
def test_a_token_that_does_not_exist_is_not_allowed(
    compiler: ConstraintCompiler, tokens: TokenizerFolder, token: int
) -> None:
    state = compiler.state(regex("ab"))
    before = allowed(state)
    assert [ids_of(mask) for mask in state.masks([token], [token])] == [before, before]


def test_special_tokens_are_no_text(compiler: ConstraintCompiler, tokens: TokenizerFolder) -> None:
    first = allowed(compiler.state(regex("<end>|<other>")))
    assert first == {tokens.id("<")}


@given(
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 1 << 30),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.booleans()), max_size=8),
)
@settings(max_examples=60)
def test_masks_depend_on_the_output_alone(
    compiler: ConstraintCompiler,
    tokens: TokenizerFolder,
    form: Constraint,
    seed: int,
    steps: list[tuple[int, int, bool]],
) -> None:
    draw = random.Random(seed)
    state, output = compiler.state(form), list[int]()
    for num_kept, num_pending, is_valid in steps:
        del output[num_kept:]
        pending = _walk(compiler, form, output, num_pending, draw)
        if pending and not is_valid:
            pending[draw.randrange(len(pending))] = draw.randrange(tokens.size)
        masks = [ids_of(mask) for mask in state.masks(output, pending)]
        assert masks == _fresh_masks(compiler, form, output, pending)
        num_accepted = draw.randint(0, len(pending))
        for token, mask in zip(pending[:num_accepted], masks, strict=False):
            if token not in mask:
                break
            output.append(token)


def _walk(
    compiler: ConstraintCompiler,
    form: Constraint,
    output: list[int],
    length: int,
    draw: random.Random,
) -> list[int]:
    """Return allowed tokens behind an output."""
    state, found = compiler.state(form), list[int]()
    for _ in range(length):
        found.append(draw.choice(sorted(allowed(state, output + found))))
    return found


def _fresh_masks(
    compiler: ConstraintCompiler, form: Constraint, output: list[int], pending: list[int]
) -> list[set[int]]:
    """Return what the masks have to be: each of a state of its own, the last one repeated."""
    found = [allowed(compiler.state(form), output)]
    for place, token in enumerate(pending):
        if token not in found[-1]:
            return found + found[-1:] * (len(pending) + 1 - len(found))
        found.append(allowed(compiler.state(form), output + pending[: place + 1]))
    return found


def test_sequences_of_one_constraint_are_independent(
    compiler: ConstraintCompiler, tokens: TokenizerFolder
) -> None:
    first, second = compiler.state(regex("ab")), compiler.state(regex("ab"))
    start = ids_of(second.masks([], [])[0])
    assert allowed(first, [tokens.id("ab")]) == set(tokens.ends)
    assert allowed(second) == start


@pytest.mark.parametrize("more", [0, 1, 40])
def test_masks_have_a_bit_for_each_token_of_the_model(
    tokens: TokenizerFolder, compiler: ConstraintCompiler, more: int
) -> None:
    size = tokens.size + more
    padded = ConstraintCompiler(str(tokens.folder), size, tokens.ends)
    try:
        (mask,) = padded.state(regex(r"[\s\S]*")).masks([], [])
    finally:
        padded.close()
    assert mask.shape == ((size + 31) // 32,)
    assert ids_of(mask) == allowed(compiler.state(regex(r"[\s\S]*")))


def test_tokens_that_the_model_has_not_are_not_allowed(tokens: TokenizerFolder) -> None:
    size = tokens.id("a") + 3
    cut = ConstraintCompiler(str(tokens.folder), size, (0,))
    try:
        (mask,) = cut.state(regex("[a-z]")).masks([], [])
        state = cut.state(regex("z"))
        with pytest.raises(InvalidInputError, match="token that the model has not"):
            state.masks([], [])
    finally:
        cut.close()
    assert ids_of(mask) == set(map(tokens.id, "abc"))
    assert mask.shape == ((size + 31) // 32,)


def test_a_place_that_is_too_complex_ends_the_sequence(
    compiler: ConstraintCompiler, tokens: TokenizerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = compiler.state(regex("[ab]{1,5}"))

    def fail(_: object, row: Mask) -> str:
        return "lexer error: too many states"

    monkeypatch.setattr("amusd.engine.sampling.constraint_state.fill", fail)
    with pytest.raises(InvalidInputError, match="too complex after 1 tokens of output: simplify"):
        state.masks([tokens.id("a")], [])
