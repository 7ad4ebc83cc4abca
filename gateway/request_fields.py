"""Reads the fields of a request's JSON object by type. What nobody reads is ignored."""

from collections.abc import Mapping
from typing import Any

from gateway.api_errors import bad_field

MAX_UINT32 = 2**32 - 1


class Fields:
    """A JSON object. A field that is null counts as unset.

    Every reader raises an ApiError that names the field if its value is of another type or out of
    range.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        """Read ``values``; ``path`` is where they stand in the request."""
        self._values = values
        self._path = path
        self._read: set[str] = set()

    def name_of(self, name: str) -> str:
        """Return the name of a field with where it stands."""
        return f"{self._path}.{name}" if self._path else name

    @property
    def ignored(self) -> list[str]:
        """Names of the fields that nothing has read."""
        return sorted(self._values.keys() - self._read)

    def value(self, name: str) -> Any:
        """Return the value of any type; None if it is unset."""
        self._read.add(name)
        return self._values.get(name)

    def has(self, name: str) -> bool:
        """Whether the field is set."""
        return self.value(name) is not None

    def text(self, name: str, default: str = "") -> str:
        """Return a text."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a number; the reader's caller checks its range."""
        value = self.value(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        return float(value)

    def integer(self, name: str, least: int, most: int = MAX_UINT32) -> int | None:
        """Return a whole number from ``least`` to ``most``; None if it is unset."""
        value = self.value(name)
        if value is None:
            return None
        number = _whole(value)
        if number is None:
            raise self._wrong(name, "a whole number")
        if not least <= number <= most:
            full = self.name_of(name)
            raise bad_field(full, f"{full} is {number}: use {least} to {most}")
        return number

    def integers(self, name: str) -> list[int]:
        """Return a list of whole numbers from 0 on, such as token ids."""
        value = self.value(name)
        if value is None:
            return []
        numbers = [_whole(one) for one in value] if isinstance(value, list) else [None]
        if not all(one is not None and 0 <= one <= MAX_UINT32 for one in numbers):
            raise self._wrong(name, "a list of token ids")
        return [one for one in numbers if one is not None]

    def texts(self, name: str, or_text: bool = False) -> list[str]:
        """Return a list of texts; with ``or_text`` a single text counts as a list of one."""
        value = self.value(name)
        if value is None:
            return []
        if or_text and isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(name, "a text or a list of texts" if or_text else "a list of texts")
        return value

    def inner(self, name: str) -> "Fields | None":
        """Return the fields of an object; None if it is unset."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Fields(value, self.name_of(name))

    def inner_list(self, name: str) -> "list[Fields]":
        """Return the fields of each object in a list."""
        value = self.value(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self._wrong(name, "a list of objects")
        full = self.name_of(name)
        return [Fields(one, f"{full}[{number}]") for number, one in enumerate(value)]

    def _wrong(self, name: str, expected: str) -> Exception:
        full = self.name_of(name)
        return bad_field(full, f"{full} is not {expected}")


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None
