"""Constraints of every kind: what they allow, and which ones are refused."""

import json
import random
import threading
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.sampling import constraints
from amusd.engine.sampling.constraints import ConstraintCompiler
from amusd.protocol.errors import InvalidInputError, NotServedError
from amusd.sampling.parameters import Constraint, ConstraintKind
from tests.engine.sampling.constraint_tokens import (
    TokenizerFolder,
    allowed,
    grammar,
    regex,
    schema,
)

MAX_STEPS = 3000
TEXTS = st.text('ab"\\/\n\té☕<>{}|.*()^$ -', min_size=1, max_size=6)
LEAVES = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 200),
    ),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 4)),
    st.builds(lambda texts: {"enum": texts}, st.lists(TEXTS, min_size=1, max_size=4, unique=True)),
)


def _array(items: Any, least: int, more: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}


def _object(properties: dict[str, Any], is_required: bool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if is_required else [],
        "additionalProperties": False,
    }


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(_array, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(_object, st.dictionaries(TEXTS, inner, max_size=3), st.booleans()),
        st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


def _random_output(
    compiler: ConstraintCompiler, tokens: TokenizerFolder, form: Constraint, seed: int
) -> str:
    """Return a text of random allowed tokens that ends where it may, half of the time."""
    draw, state, output = random.Random(seed), compiler.state(form), list[int]()
    for _ in range(MAX_STEPS):
        choices = allowed(state, output)
        rest = sorted(choices - set(tokens.ends))
        assert rest or choices == set(tokens.ends)
        if not rest or (len(rest) < len(choices) and draw.random() < 0.5):
            return tokens.text(output)
        output.append(draw.choice(rest))
    raise AssertionError("the output does not end")


@given(value=SCHEMAS, seed=st.integers(0, 1 << 30))
@settings(max_examples=60)
def test_random_outputs_are_valid_under_their_schema(
    compiler: ConstraintCompiler, tokens: TokenizerFolder, value: dict[str, Any], seed: int
) -> None:
    text = _random_output(compiler, tokens, schema(value), seed)
    jsonschema.validate(json.loads(text), value)


@given(texts=st.lists(TEXTS, min_size=1, max_size=5), seed=st.integers(0, 1 << 30))
@settings(max_examples=40)
def test_a_random_output_is_one_of_the_choices(
    compiler: ConstraintCompiler, tokens: TokenizerFolder, texts: list[str], seed: int
) -> None:
    form = Constraint(ConstraintKind.CHOICES, choices=tuple(texts))
    assert _random_output(compiler, tokens, form, seed) in texts


@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
@settings(max_examples=20)
def test_every_choice_is_allowed(
    compiler: ConstraintCompiler, tokens: TokenizerFolder, texts: list[str]
) -> None:
    form = Constraint(ConstraintKind.CHOICES, choices=tuple(texts))
    for text in texts:
        assert allowed(compiler.state(form), tokens.ids(text)) >= set(tokens.ends)


def test_a_regex_matches_the_whole_output(
    compiler: ConstraintCompiler, tokens: TokenizerFolder
) -> None:
    for form in (regex("12|ab"), regex("^(12|ab)$")):
        assert allowed(compiler.state(form)) == {tokens.id(text) for text in ("1", "12", "a", "ab")}
        assert allowed(compiler.state(form), [tokens.id("ab")]) == set(tokens.ends)


def test_a_grammar_is_context_free(compiler: ConstraintCompiler, tokens: TokenizerFolder) -> None:
    form = grammar('start: "(" start ")" | "a"')
    seen = {_random_output(compiler, tokens, form, seed) for seed in range(8)}
    assert all(text.count("(") == text.count(")") and "a" in text for text in seen)
    assert len(seen) > 1


def test_a_json_object_is_any_object(compiler: ConstraintCompiler, tokens: TokenizerFolder) -> None:
    form = Constraint(ConstraintKind.JSON_OBJECT)
    assert allowed(compiler.state(form)) == {tokens.id("{"), tokens.id('{"')}
    text = '{"a": [1.5e3, {"b\\n": null}, "é"], "c": true}'
    assert allowed(compiler.state(form), tokens.ids(text)) == set(tokens.ends)


def test_whitespace_in_json_ends(compiler: ConstraintCompiler, tokens: TokenizerFolder) -> None:
    state = compiler.state(schema({"type": "array"}))
    output = [tokens.id("[")]
    while tokens.id(" ") in allowed(state, output):
        output.append(tokens.id(" "))
        assert len(output) < 30


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (regex("(a"), "the regex cannot be used: unclosed group; change it"),
        (regex(r"\bx"), "lookarounds not supported"),
        (regex("(?=a)b"), "look-around.* is not supported"),
        (regex(r"(a)\1"), "backreferences are not supported"),
        (regex(r"[a&&b]"), "no output matches it"),
        (Constraint(ConstraintKind.JSON_SCHEMA, "{"), "the json_schema cannot be used: EOF"),
        (Constraint(ConstraintKind.JSON_SCHEMA, "3"), "Expecting object schema"),
        (schema({"not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (schema({"$ref": "https://example.com/other.json"}), "is not present in a registry"),
        (schema({"type": "integer", "minimum": 3, "maximum": 2}), "json_schema cannot be used: "),
        (grammar("start: missing"), 'the grammar cannot be used: unknown name: "missing"'),
        (grammar('begin: "a"'), "no start rule"),
        (grammar('start: s\ns: s "a"'), "no output matches it"),
    ],
)
def test_a_malformed_constraint_is_refused_in_one_line(
    compiler: ConstraintCompiler, form: Constraint, message: str
) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(InvalidInputError, match=message) as refused:
            compiler.prepare(form)
        assert "\n" not in str(refused.value)


def _chain(num_rules: int) -> str:
    rules = (f"r{rule}: r{rule + 1} r{rule + 1}" for rule in range(num_rules))
    return "\n".join(("start: r0", *rules, f'r{num_rules}: "x"'))


def _references(number: int) -> dict[str, Any]:
    inner = {f"d{at}": {"items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(number)}
    return {"$defs": inner | {f"d{number}": {}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(regex("(" * 30 + "a" + "{1,9})" * 30), id="nested quantifiers"),
        pytest.param(regex("(" * 1000 + "a" + ")" * 1000), id="nested groups"),
        pytest.param(regex("a" * 200_000), id="long regex"),
        pytest.param(
            Constraint(ConstraintKind.JSON_SCHEMA, '{"items":' * 9000 + "{}" + "}" * 9000),
            id="nested schema",
        ),
        pytest.param(
            schema({"properties": {f"p{n}": {} for n in range(9000)}}), id="many properties"
        ),
        pytest.param(
            grammar(
                "\n".join(
                    (
                        "start: A0",
                        *(f"A{n}: A{n + 1} & /.{{0,{n}}}x*/" for n in range(99)),
                        'A99: "x"',
                    )
                )
            ),
            id="intersections of terminals",
        ),
        pytest.param(grammar(_chain(12_000)), id="chain of rules"),
        pytest.param(schema(_references(5000)), id="chain of references"),
    ],
)
def test_a_constraint_that_explodes_is_refused_or_works(
    compiler: ConstraintCompiler, form: Constraint
) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidInputError, match="cannot be used"):
        compiler.prepare(form)
    assert time.monotonic() - started < 60
    assert allowed(compiler.state(regex("a+")))


def test_a_large_enum_works(compiler: ConstraintCompiler, tokens: TokenizerFolder) -> None:
    values = [f"value {n} {n * 7919 % 10007}" for n in range(5000)]
    state = compiler.state(schema({"enum": values}))
    assert allowed(state, tokens.ids(json.dumps(values[1234]))) == set(tokens.ends)


def test_a_constraint_is_compiled_once(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiler.prepare(regex("a{7}"))
    monkeypatch.setattr(constraints, "_compile", None)
    assert compiler.prepare(regex("a{7}")) is first


def test_a_prepared_constraint_stays_compiled_as_long_as_it_is_held(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = compiler.prepare(regex("a{8}"))
    monkeypatch.setattr(constraints, "_MAX_KEPT", 2)
    compiler._kept.clear()
    for length in range(20, 24):
        compiler.prepare(regex(f"a{{{length}}}"))
    assert len(compiler._kept) <= 2
    assert compiler.prepare(regex("a{8}")) is held


def test_threads_prepare_at_once(compiler: ConstraintCompiler) -> None:
    done: list[int] = []

    def prepare(number: int) -> None:
        compiler.prepare(regex(f"b{{{number % 3 + 1}}}"))
        done.append(number)

    threads = [threading.Thread(target=prepare, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(6))


def test_a_model_without_an_end_takes_no_constraint(tokens: TokenizerFolder) -> None:
    with pytest.raises(NotServedError, match="no end-of-text token"):
        ConstraintCompiler(str(tokens.folder), tokens.size).prepare(regex("a"))


def test_a_model_without_a_tokenizer_takes_no_constraint() -> None:
    with pytest.raises(NotServedError, match="neither a tokenizer nor an end-of-text token"):
        ConstraintCompiler("", 256).state(regex("a"))


@pytest.mark.parametrize("content", [None, "{}", "no JSON"])
def test_a_broken_tokenizer_refuses_constraints_only(tmp_path: Any, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    broken = ConstraintCompiler(str(tmp_path), 256, (0,))
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=r"its tokenizer cannot be used .*; send no"):
            broken.prepare(regex("a"))
