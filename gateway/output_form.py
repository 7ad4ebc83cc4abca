"""The form of an output that a request asks for, in the spellings of OpenAI and vLLM."""

from collections.abc import Iterator
from typing import Any

import orjson

from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import Constraint, ConstraintKind
from amusd.v1 import sampling_pb2
from gateway.api_errors import bad_field
from gateway.request_fields import Fields

_KINDS = {
    "json": ConstraintKind.JSON_SCHEMA,
    "regex": ConstraintKind.REGEX,
    "choice": ConstraintKind.CHOICES,
    "grammar": ConstraintKind.GRAMMAR,
    "json_object": ConstraintKind.JSON_OBJECT,
}
_FORMATS = "text, json_object or json_schema"

Named = tuple[str, Constraint]
"""A constraint and the field that asks for it."""


def constraint_of(fields: Fields, tool_schema: dict[str, Any] | None) -> Constraint | None:
    """Return the form of the output; ``tool_schema`` is that of the tool call it must be.

    Raises:
        ApiError: a form is malformed, or there are several.
    """
    found = [*_response_format(fields), *_guided(fields), *_structured(fields)]
    if tool_schema is not None:
        found.append(("tool_choice", _made("tool_choice", "json", tool_schema)))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise bad_field(found[1][0], f"{names} each ask for a form of the output: use only one")
    return found[0][1] if found else None


def constraint_to_proto(constraint: Constraint) -> sampling_pb2.Constraint:
    """Return the message for a constraint."""
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return sampling_pb2.Constraint(json_object=True)
        case ConstraintKind.CHOICES:
            choices = sampling_pb2.Choices(texts=constraint.choices)
            return sampling_pb2.Constraint(choices=choices)
        case ConstraintKind.JSON_SCHEMA:
            return sampling_pb2.Constraint(json_schema=constraint.text)
        case ConstraintKind.REGEX:
            return sampling_pb2.Constraint(regex=constraint.text)
        case ConstraintKind.GRAMMAR:
            return sampling_pb2.Constraint(grammar=constraint.text)


def _response_format(fields: Fields) -> Iterator[Named]:
    inner = fields.inner("response_format")
    if inner is None:
        return
    kind = inner.text("type")
    if kind == "json_object":
        yield "response_format", Constraint(ConstraintKind.JSON_OBJECT)
    elif kind == "json_schema":
        described = inner.inner("json_schema")
        schema = described.value("schema") if described is not None else None
        yield "response_format", _made("response_format.json_schema.schema", "json", schema)
    elif kind != "text":
        raise bad_field("response_format", f"response_format.type is {kind!r}: use {_FORMATS}")


def _guided(fields: Fields) -> Iterator[Named]:
    for kind in _KINDS:
        name = f"guided_{kind}"
        if fields.has(name) and fields.value(name) is not False:
            yield name, _made(name, kind, fields.value(name))


def _structured(fields: Fields) -> Iterator[Named]:
    inner = fields.inner("structured_outputs")
    if inner is None:
        return
    if inner.has("structural_tag"):
        raise bad_field(
            "structured_outputs.structural_tag",
            f"structured_outputs.structural_tag is not served: use {', '.join(_KINDS)}",
        )
    for kind in _KINDS:
        if inner.has(kind) and inner.value(kind) is not False:
            name = inner.name_of(kind)
            yield name, _made(name, kind, inner.value(kind))


def _made(name: str, kind: str, value: Any) -> Constraint:
    try:
        match kind, value:
            case "json", dict() | bool():
                return Constraint(_KINDS[kind], orjson.dumps(value).decode())
            case "json_object", True:
                return Constraint(_KINDS[kind])
            case "choice", list() if all(isinstance(one, str) for one in value):
                return Constraint(_KINDS[kind], choices=tuple(value))
            case (("json" | "regex" | "grammar"), str()):
                return Constraint(_KINDS[kind], value)
    except InvalidInputError as error:
        raise bad_field(name, f"{name}: {error}") from error
    expected = {"json": "a JSON schema", "choice": "a list of texts", "json_object": "true"}
    raise bad_field(name, f"{name} is not {expected.get(kind, 'a text')}")
