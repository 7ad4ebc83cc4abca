"""What follows from a declared setting: names, reading and writing, bounds, flags."""

import enum
from dataclasses import dataclass
from typing import Any

import pytest

from amusd.protocol.errors import InvalidInputError
from amusd.settings import (
    Setting,
    check_bounds,
    flags_for,
    flags_of,
    like,
    part,
    setting,
    settings_in,
    with_values,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Inner:
    wait_seconds: float = setting(2.5, "Wait.", above=0)
    colour: Colour = setting(Colour.RED, "Colour.", variable="COLOUR")
    not_declared: int = 7

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner = part(Inner(wait_seconds=4.0))
    size: int = setting(3, "Size.", unit="tokens", at_least=1, at_most=9)
    fast: bool = setting(True, "Fast.")
    loud: bool = setting(False, "Loud.")
    perhaps: bool | None = setting(None, "Perhaps.", default_text="it depends", variable="")
    numbers: tuple[int, ...] = setting(
        (),
        "Numbers.",
        read=lambda text: tuple(map(int, text.split())),
        write=lambda value: " ".join(map(str, value)),
    )


SETTINGS = settings_in(Outer())
BY_NAME = {one.name: one for one in SETTINGS}


def row(one: Setting) -> tuple[str, str, str, str, str]:
    return one.flag, one.off_flag, one.variable, one.default_text, one.unit


def test_names_follow_from_the_field() -> None:
    assert [row(one) for one in SETTINGS] == [
        ("--wait", "", "AMUSD_WAIT", "4", "seconds"),
        ("--colour", "", "COLOUR", "red", ""),
        ("--size", "", "AMUSD_SIZE", "3", "tokens"),
        ("--fast", "--no-fast", "AMUSD_FAST", "on", ""),
        ("--loud", "", "AMUSD_LOUD", "off", ""),
        ("--perhaps", "--no-perhaps", "", "it depends", ""),
        ("--numbers", "", "AMUSD_NUMBERS", "", ""),
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("wait", 0.125),
        ("wait", 600.0),
        ("wait", 1e-07),
        ("wait", 12345678.5),
        ("colour", Colour.BLUE),
        ("size", 9),
        ("fast", True),
        ("loud", False),
        ("numbers", (3, 1)),
        ("numbers", ()),
    ],
)
def test_a_value_that_is_written_is_read_as_it_was(name: str, value: Any) -> None:
    assert BY_NAME[name].read(BY_NAME[name].write(value)) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("size", "0", "0 is out of range, use 1 to 9"),
        ("size", "10", "10 is out of range, use 1 to 9"),
        ("size", "3.5", "'3.5' is not a whole number"),
        ("wait", "0", "0 is out of range, use more than 0"),
        ("wait", "nan", "nan is out of range"),
        ("wait", "soon", "'soon' is not a number"),
        ("colour", "green", "'green' is not one of red, blue"),
        ("colour", "RED", "'RED' is not one of"),
        ("fast", "quite", "'quite' is not one of on, off"),
    ],
)
def test_a_wrong_text_is_refused_with_what_is_right(name: str, text: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        BY_NAME[name].read(text)


def test_bounds_hold_for_values_from_code() -> None:
    with pytest.raises(InvalidInputError, match="wait_seconds is 0: use more than 0"):
        Inner(wait_seconds=0)
    with pytest.raises(InvalidInputError, match="wait_seconds is nan"):
        Inner(wait_seconds=float("nan"))


def test_values_reach_their_fields_at_any_depth_and_leave_the_others() -> None:
    changed = with_values(Outer(), {"wait": 1.0, "size": 5})
    assert changed == Outer(inner=Inner(wait_seconds=1.0), size=5)
    assert with_values(Outer(), {}) == Outer()


def test_values_are_checked_where_they_are_put() -> None:
    with pytest.raises(InvalidInputError, match="wait_seconds is -1"):
        with_values(Outer(), {"wait": -1})


def test_flags_are_those_that_the_command_line_reads() -> None:
    words = flags_for(SETTINGS, size=5, fast=False, loud=True, perhaps=None, numbers=(1, 2))
    assert words == ["--size", "5", "--no-fast", "--loud", "--numbers", "1 2"]
    assert flags_of(SETTINGS, Inner(9.0, Colour.BLUE)) == ["--wait", "9", "--colour", "blue"]


def test_flags_of_a_part_leave_out_what_the_command_does_not_take() -> None:
    @dataclass(frozen=True, slots=True)
    class Narrow:
        inner: Inner = part(Inner(), without=("colour",))

    assert flags_of(settings_in(Narrow()), Inner(9.0, Colour.BLUE)) == ["--wait", "9"]


def test_a_setting_that_is_not_there_is_an_error_of_the_code() -> None:
    with pytest.raises(TypeError, match="there is no setting sise"):
        flags_for(SETTINGS, sise=5)

    @dataclass(frozen=True, slots=True)
    class Wrong:
        inner: Inner = part(Inner(), without=("color",))

    with pytest.raises(TypeError, match="has no setting color"):
        settings_in(Wrong())


def test_two_settings_of_one_name_are_an_error_of_the_code() -> None:
    @dataclass(frozen=True, slots=True)
    class Twice:
        inner: Inner = part(Inner())
        wait: int = setting(1, "Wait again.")

    with pytest.raises(TypeError, match="declares a setting twice"):
        settings_in(Twice())


def test_a_setting_can_be_declared_like_another() -> None:
    @dataclass(frozen=True, slots=True)
    class Other:
        wait_seconds: float = like(Inner, "wait_seconds", default=1.0, variable="")
        colour: Colour = like(Inner, "colour")

    assert Other() == Other(1.0, Colour.RED)
    wait, colour = settings_in(Other())
    assert row(wait) == ("--wait", "", "", "1", "seconds")
    assert wait.declaration.help == "Wait."
    with pytest.raises(InvalidInputError, match="out of range"):
        wait.read("0")
    assert row(colour) == ("--colour", "", "COLOUR", "red", "")
