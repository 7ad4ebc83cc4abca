"""Constrained output of the embedded pair: valid, and the same with every strategy."""

import json
from typing import Any

import jsonschema
import pytest

from amusd.client import Client
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.finish import FinishReason
from amusd.protocol.strategy import Strategy

pytestmark = [pytest.mark.pair, pytest.mark.process]

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
QUESTION = "Invent a person with a name, an age and hobbies, as a JSON object."


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_strategy_writes_the_same_valid_document(client: Client, temperature: float) -> None:
    outputs = []
    for strategy in Strategy:
        output = client.chat(
            QUESTION, strategy=strategy, temperature=temperature, seed=4, json_schema=PERSON,
            max_tokens=160,
        ).wait()  # fmt: skip
        assert output.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(output.text), PERSON)
        outputs.append(output)
    assert len({tuple(one.tokens) for one in outputs}) == 1
    assert sum(one.summary().num_accepted for one in outputs) > 0  # the draft has the form, too


@pytest.mark.parametrize(
    ("form", "texts"),
    [
        ({"choices": ["yes", "no", "perhaps"]}, {"yes", "no", "perhaps"}),
        ({"regex": "ab{3}c"}, None),
    ],
)
def test_other_forms_hold_too(client: Client, form: dict[str, Any], texts: set[str] | None) -> None:
    found = {
        client.chat("Is water wet?", strategy=strategy, max_tokens=12, **form).wait().text
        for strategy in Strategy
    }
    assert len(found) == 1
    assert found <= (texts or {"abbbc"})


def test_a_broken_form_is_refused_in_words(client: Client) -> None:
    with pytest.raises(InvalidInputError, match="regex"):
        client.chat("Hello", regex="(a", max_tokens=4).wait()
