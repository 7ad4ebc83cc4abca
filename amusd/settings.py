"""Settings that are declared once, as fields of frozen dataclasses.

``setting`` declares a field that an operator sets, ``part`` a field that holds further settings.
Flag, environment variable, help text, range check and the row in docs/configuration.md follow
from the declaration. A field without a declaration is set by code only. Nothing here reads the
environment or knows the command line library.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from amusd.protocol.errors import InvalidInputError

_DECLARATION = "declaration"
_WITHOUT = "without"
_SECONDS = "_seconds"
_SWITCH = dict.fromkeys(("on", "1", "true", "t", "yes", "y"), True) | dict.fromkeys(
    ("off", "0", "false", "f", "no", "n"), False
)


class Settings(Protocol):
    """An instance of a dataclass whose fields are declared with ``setting`` or ``part``."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T")
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Declaration:
    """What is known of a setting beside its name, type and default.

    ``unit`` is what a number counts or a text names; a field that ends with ``_seconds`` has it
    from its name. ``at_least``, ``above`` and ``at_most`` bound a number. ``variable`` None means
    ``AMUSD_`` and the name; empty: the setting has no environment variable. ``default_text``
    describes a default that depends on something. ``read`` and ``write`` convert values of other
    types than text, number and enum; ``read`` raises InvalidInputError. A setting that
    ``is_repeated`` is a tuple of what ``read`` makes of each value that its flag is given.
    """

    help: str
    unit: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    variable: str | None = None
    default_text: str = ""
    read: Callable[[str], Any] | None = None
    write: Callable[[Any], str] | None = None
    is_repeated: bool = False

    @property
    def value_range(self) -> str:
        """The range of a number in words; empty if it has no bounds."""
        if self.above is not None:
            most = f", at most {self.at_most:g}" if self.at_most is not None else ""
            return f"more than {self.above}{most}"
        if self.at_least is None:
            return ""
        return f"{self.at_least} " + ("or more" if self.at_most is None else f"to {self.at_most}")

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is within the bounds; NaN never is."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )


def setting(default: T, help: str, **details: Any) -> T:
    """Declare a field that an operator sets; ``details`` are those of ``Declaration``."""
    declaration = Declaration(help, **details)
    found: T = dataclasses.field(default=default, metadata={_DECLARATION: declaration})
    return found


def like(owner: type[Settings], field: str, **changes: Any) -> Any:
    """Declare a field as ``owner`` declares its ``field``, except for ``changes``."""
    source = owner.__dataclass_fields__[field]
    default = changes.pop("default", source.default)
    declaration = dataclasses.replace(source.metadata[_DECLARATION], **changes)
    return dataclasses.field(default=default, metadata={_DECLARATION: declaration})


def part(default: T, without: Collection[str] = ()) -> T:
    """Declare a field that holds further settings, except those named in ``without``."""
    found: T = dataclasses.field(default=default, metadata={_WITHOUT: frozenset(without)})
    return found


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a command: its declaration, and its type and default there."""

    owner: type[Settings]
    field: str
    kind: type
    default: Any
    declaration: Declaration

    @property
    def name(self) -> str:
        """The name by which the setting's value is passed on: the field's, without its seconds."""
        return self.field.removesuffix(_SECONDS)

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def off_flag(self) -> str:
        """The flag that turns a switch off; empty if it is off by default, or no switch."""
        is_pair = self.kind is bool and self.default is not False
        return f"--no-{self.flag.removeprefix('--')}" if is_pair else ""

    @property
    def variable(self) -> str:
        """The environment variable; empty if there is none."""
        variable = self.declaration.variable
        return f"AMUSD_{self.name.upper()}" if variable is None else variable

    @property
    def unit(self) -> str:
        """What a number counts or a text names; empty if nothing is declared."""
        return "seconds" if self.field.endswith(_SECONDS) else self.declaration.unit

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts of the values of an enum or a switch; empty for other types."""
        if self.kind is bool:
            return ("on", "off")
        if not issubclass(self.kind, enum.Enum):
            return ()
        return tuple(str(one.value) for one in self.kind)

    @property
    def default_text(self) -> str:
        """The default in words; empty if it is empty."""
        if self.declaration.default_text:
            return self.declaration.default_text
        return self.write(self.default)

    def read(self, text: str) -> Any:
        """Return the value that ``text`` stands for.

        Raises:
            InvalidInputError: not a value of this setting, or out of range.
        """
        value = self._parse(text)
        if not self.declaration.allows(value):
            raise InvalidInputError(f"{text} is out of range, use {self.declaration.value_range}")
        return value

    def _parse(self, text: str) -> Any:
        if self.declaration.read is not None:
            return self.declaration.read(text)
        try:
            return _SWITCH[text.strip().lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError):
            raise InvalidInputError(f"{text!r} is not {self._expected}") from None

    @property
    def _expected(self) -> str:
        numbers = {int: "a whole number", float: "a number"}
        return numbers.get(self.kind) or f"one of {', '.join(self.choices)}"

    def write(self, value: Any) -> str:
        """Return the text that ``read`` turns into ``value``."""
        if self.declaration.write is not None:
            return self.declaration.write(value)
        if self.kind is bool:
            return "on" if value else "off"
        if isinstance(value, enum.Enum):
            return str(value.value)
        return str(value).removesuffix(".0") if isinstance(value, float) else str(value)

    def flags(self, value: Any) -> list[str]:
        """Return the words of a command line that set ``value``."""
        if self.kind is not bool:
            return [self.flag, self.write(value)]
        chosen = {True: self.flag, False: self.off_flag}.get(value, "")
        return [chosen] if chosen else []


def check_bounds(settings: Settings) -> None:
    """Check each declared field of ``settings`` against its bounds; parts check themselves.

    Raises:
        InvalidInputError: a value is out of range; it names the field.
    """
    for field in dataclasses.fields(settings):
        declaration = field.metadata.get(_DECLARATION)
        value = getattr(settings, field.name)
        if declaration is not None and not declaration.allows(value):
            raise InvalidInputError(f"{field.name} is {value}: use {declaration.value_range}")


def settings_in(defaults: Settings) -> tuple[Setting, ...]:
    """Return the settings of ``defaults`` and its parts; their values there are the defaults.

    Raises:
        TypeError: two settings have one name, or a part is without a setting that it never had.
    """
    found = tuple(_settings_in(defaults))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise TypeError(f"{type(defaults).__name__} declares a setting twice: {sorted(names)}")
    return found


def _settings_in(defaults: Settings) -> Iterator[Setting]:
    hints = typing.get_type_hints(type(defaults))
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if _DECLARATION in field.metadata:
            kind = _without_none(hints[field.name])
            declaration = field.metadata[_DECLARATION]
            yield Setting(type(defaults), field.name, kind, value, declaration)
        elif _WITHOUT in field.metadata:
            yield from _settings_of_part(value, field.metadata[_WITHOUT])


def _settings_of_part(defaults: Settings, without: frozenset[str]) -> Iterator[Setting]:
    found = settings_in(defaults)
    unknown = without - {one.name for one in found}
    if unknown:
        raise TypeError(f"{type(defaults).__name__} has no setting {', '.join(sorted(unknown))}")
    return (one for one in found if one.name not in without)


def _without_none(hint: Any) -> type:
    """Return the type of a field that may also be None."""
    if isinstance(hint, types.UnionType):
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
    kind: type = typing.get_origin(hint) or hint
    return kind


def with_values(defaults: S, values: Mapping[str, Any]) -> S:
    """Return ``defaults`` with new values of its settings, by the settings' names."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(defaults):
        name = field.name.removesuffix(_SECONDS)
        if _WITHOUT in field.metadata:
            changes[field.name] = with_values(getattr(defaults, field.name), values)
        elif _DECLARATION in field.metadata and name in values:
            changes[field.name] = values[name]
    return dataclasses.replace(defaults, **changes)


def flags_for(settings: Sequence[Setting], **values: Any) -> list[str]:
    """Return the words of a command line that set ``values``, by the names of ``settings``.

    Raises:
        TypeError: there is no setting of that name.
    """
    known = {one.name: one for one in settings}
    unknown = values.keys() - known.keys()
    if unknown:
        raise TypeError(f"there is no setting {', '.join(sorted(unknown))}")
    return [word for name, value in values.items() for word in known[name].flags(value)]


def flags_of(settings: Sequence[Setting], holder: Settings) -> list[str]:
    """Return the words of a command line that set what ``holder`` holds of ``settings``."""
    own = [one for one in settings if one.owner is type(holder)]
    return [word for one in own for word in one.flags(getattr(holder, one.field))]
