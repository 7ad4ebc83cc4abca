"""The tools of a chat request, and the form of the output that its tool_choice asks for."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from gateway.api_errors import bad_field
from gateway.request_fields import Fields

_MODES = "none, auto, required or a function"


class ToolMode(Enum):
    """Whether an output has tool calls."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tools of a request.

    ``described`` is what the chat template gets. ``parameters`` are the JSON schemas of the
    functions that may be called, by name. Without ``parallel`` an output has one call at most.
    """

    mode: ToolMode
    described: list[dict[str, Any]]
    parameters: dict[str, dict[str, Any]]
    parallel: bool = True

    def schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of the output; None: it is free.

        It is the arguments of a named function, or a list of calls with name and parameters.
        """
        if self.mode is ToolMode.NAMED:
            (schema,) = self.parameters.values()
            return schema
        if self.mode is not ToolMode.REQUIRED:
            return None
        definitions: dict[str, Any] = {}
        calls = [_call(name, one, definitions) for name, one in self.parameters.items()]
        schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        if not self.parallel:
            schema["maxItems"] = 1
        return {**schema, "$defs": definitions} if definitions else schema


def tool_choice_of(fields: Fields) -> ToolChoice | None:
    """Return the tools of a request; None if it has none.

    Raises:
        ApiError: a tool or the choice is malformed.
    """
    parameters = {}
    for tool in fields.inner_list("tools"):
        name, schema = _function(tool)
        parameters[name] = schema
    described = fields.value("tools") or []
    parallel = fields.flag("parallel_tool_calls", True)
    choice = fields.value("tool_choice")
    if not parameters:
        if choice not in (None, "none", "auto"):
            raise bad_field("tool_choice", "tool_choice is set without tools: send tools")
        return None
    if isinstance(choice, dict):
        name = _named(fields)
        if name not in parameters:
            raise bad_field(
                "tool_choice", f"tool_choice names {name!r}, which is none of the tools"
            )
        return ToolChoice(ToolMode.NAMED, described, {name: parameters[name]})
    match choice:
        case None | "auto":
            return ToolChoice(ToolMode.AUTO, described, parameters, parallel)
        case "required":
            return ToolChoice(ToolMode.REQUIRED, described, parameters, parallel)
        case "none":
            return ToolChoice(ToolMode.NONE, [], {})
    raise bad_field("tool_choice", f"tool_choice is not {_MODES}")


def _function(tool: Fields) -> tuple[str, dict[str, Any]]:
    function = tool.inner("function")
    if tool.text("type") != "function" or function is None or not function.text("name"):
        name = tool.name_of("function")
        raise bad_field("tools", f"{name} is missing or has no name, or its type is not function")
    function.inner("parameters")
    return function.text("name"), function.value("parameters") or {"type": "object"}


def _named(fields: Fields) -> str:
    inner = fields.inner("tool_choice")
    function = inner.inner("function") if inner is not None else None
    if function is None:
        raise bad_field("tool_choice", f"tool_choice is not {_MODES}")
    return function.text("name")


def _call(name: str, schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a call; definitions move to the root, where references look for them."""
    definitions.update(schema.get("$defs") or {})
    parameters = {key: value for key, value in schema.items() if key != "$defs"}
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [name]}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
