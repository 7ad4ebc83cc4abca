"""A Jinja environment for chat templates: what they expect, within bounds of time and size.

A template is code that comes with a model. It may loop and grow texts only as far as a prompt can
need: its loops and calls look at a deadline, and its operations at the size of their results.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MAX_CHARACTERS = 1 << 24  # four times what the largest request holds
MAX_SECONDS = 5.0
_MAX_EXPONENT = 64
_WIDTH = re.compile(r"\d{7}")
_WRITERS = frozenset({"string", "join", "pprint", "format", "tojson"})  # they write their arguments
_FORMATS = frozenset({"format", "format_map"})


class TemplateBoundError(jinja2.TemplateError):
    """The template exceeds a bound of time or size."""


class TemplateSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compiles and runs chat templates. Several threads may use one sandbox at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        """Provide the functions, filters and tags that chat templates use in Transformers."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            finalize=_measured,
        )
        self._render = threading.local()
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Bound what this thread renders in the block.

        Raises:
            TemplateBoundError: the time is over, at the next loop, call or output of a template.
        """
        self._render.end = time.monotonic() + seconds
        try:
            yield
        finally:
            self._render.end = None

    def tick(self) -> None:
        """Raise TemplateBoundError if the time of this thread is over."""
        end = getattr(self._render, "end", None)
        if end is not None and time.monotonic() > end:
            raise TemplateBoundError("it takes too long")

    def call(  # named as positional arguments, as in the library
        __self,  # noqa: N805
        __context: jinja2.runtime.Context,
        __object: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call a function of a template."""
        __self.tick()
        name = getattr(__object, "__name__", "")
        owner = getattr(getattr(__object, "__wrapped__", __object), "__self__", None)
        _check_arguments(name, (owner, *args, *kwargs.values()))
        return _checked(super().call(__context, __object, *args, **kwargs))

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Compute a binary operation whose result may be large."""
        _check_operands(operator, left, right)
        return _checked(super().call_binop(context, operator, left, right))

    def concat_texts(self, parts: tuple[Any, ...]) -> str:
        """Join the operands of ``~``."""
        return str(_checked("".join(str(_measured(part)) for part in parts)))

    def _generate(
        self,
        source: jinja2.nodes.Template,
        name: str | None,
        filename: str | None,
        defer_init: bool = False,
    ) -> str:
        """Compile a template whose loops look at the deadline in each round."""
        for loop in list(source.find_all(jinja2.nodes.For)):
            tick = jinja2.nodes.EnvironmentAttribute("tick")
            call = jinja2.nodes.ExprStmt(jinja2.nodes.Call(tick, [], [], None, None))
            loop.body.insert(0, call.set_lineno(loop.lineno).set_environment(self))
        return super()._generate(source, name, filename, defer_init)


class _BoundedCode(jinja2.compiler.CodeGenerator):
    """Compiles ``~`` to a call of the sandbox, because it cannot be intercepted."""

    def visit_Concat(  # noqa: N802
        self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame
    ) -> None:
        self.write("environment.concat_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


TemplateSandbox.code_generator_class = _BoundedCode


class _GenerationTag(jinja2.ext.Extension):
    """Renders the content of ``generation`` tags, which mark the assistant's text."""

    tags = {"generation"}  # noqa: RUF012  # as the library declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateDict:
    """The ``dict`` of templates, which gives no access to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """The ``namespace`` of templates, which holds no private attributes."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as Transformers writes it: without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that neither its arguments nor its result are too large."""

    @functools.wraps(function)  # keeps the marks that say what the filter is given
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(name, (*args, *kwargs.values()))
        return _checked(function(*args, **kwargs))

    return checked


def _check_arguments(name: str, values: tuple[Any, ...]) -> None:
    """Refuse widths, counts and texts that only a runaway template passes to a function."""
    for value in values:
        if isinstance(value, int):
            _check_size(abs(value))
        elif name in _WRITERS:
            _measure(value)
        elif name == "replace":
            _checked(value)
    if name in _FORMATS and values and isinstance(values[0], str):
        _check_widths(values[0])
    if name == "replace":
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) >= 3:
            _check_size(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation before its result takes up memory."""
    if operator == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(one, (str, list, tuple)) and isinstance(times, int):
                _check_size(len(one) * times)
    elif operator == "**" and isinstance(right, int) and right > _MAX_EXPONENT:
        raise TemplateBoundError(f"it computes a power above {_MAX_EXPONENT}")
    elif operator == "%" and isinstance(left, str):
        _check_arguments("format", (left, *(right if isinstance(right, tuple) else (right,))))


def _check_widths(text: str) -> None:
    """Refuse a format whose fields are wider than any text may be."""
    if _WIDTH.search(text):
        raise TemplateBoundError("it formats a field of a million characters or more")


def _checked(value: Any) -> Any:
    """Return ``value``, a result, if it is not too long."""
    if isinstance(value, (str, list, tuple, dict)):
        _check_size(len(value))
    return value


def _measured(value: Any) -> Any:
    """Return ``value``, which is about to become text, if the text is not too long."""
    if not isinstance(value, str):
        _measure(value)
    return _checked(value)


def _measure(value: Any, size: int = 0) -> int:
    """Return ``size`` plus the least number of characters that ``value`` takes up as text."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, str):
        size += len(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            size = _measure(one, size + 1)
    _check_size(size)
    return size


def _check_size(num_characters: int) -> None:
    if num_characters > MAX_CHARACTERS:
        raise TemplateBoundError(f"it makes a text of more than {MAX_CHARACTERS} characters")
