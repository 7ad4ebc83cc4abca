"""Who is open, who waits in line, and whose turn is next."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.errors import (
    AmusdError,
    CacheFullError,
    DuplicateSessionError,
    LimitExceededError,
)
from amusd.serving.waiting_queue import Sessions, shares

LIMITS = ServiceLimits(max_sessions=5, max_context=1000, max_lookahead=4, max_waiting=2)
MEMORY = 100


@dataclass(eq=False)
class Task:
    """A session that keeps what it was told."""

    slot: int | None = None
    failed: bool = False
    errors: list[AmusdError] = field(default_factory=list)

    def tell(self, error: AmusdError) -> None:
        self.errors.append(error)


class Room:
    """Sessions in a memory for 100 tokens."""

    def __init__(self, limits: ServiceLimits = LIMITS) -> None:
        self.engine = SyntheticEngine(SyntheticModel(context=1000, memory=MEMORY))
        self.sessions: Sessions[Task] = Sessions(self.engine, limits)

    def add(self, name: str, capacity: int) -> Task:
        task = Task()
        self.sessions.check_new(name)
        self.sessions.add(name, task, capacity)
        return task

    @property
    def counts(self) -> tuple[int, int]:
        return self.sessions.num_open, self.sessions.num_waiting


def test_who_finds_no_memory_waits_and_gets_it_when_another_leaves() -> None:
    room = Room()
    first, second = room.add("a", 60), room.add("b", 60)
    assert room.counts == (1, 1)
    assert first.slot is not None
    assert second.slot is None
    assert room.sessions.remove("a") == [second]
    assert room.counts == (1, 0)
    assert second.slot is not None


def test_nobody_overtakes_those_who_wait() -> None:
    room = Room()
    room.add("a", 60)
    large, small = room.add("large", 60), room.add("small", 10)
    assert small.slot is None
    assert room.sessions.remove("a") == [large, small]


def test_the_one_in_front_holds_the_others_back_until_it_fits() -> None:
    room = Room()
    room.add("a", 50)
    room.add("b", 50)
    large, small = room.add("large", 60), room.add("small", 10)
    assert room.sessions.remove("a") == []
    assert room.sessions.remove("b") == [large, small]


def test_who_leaves_the_line_makes_way_for_those_behind() -> None:
    room = Room()
    room.add("a", 60)
    room.add("large", 60)
    small = room.add("small", 10)
    assert room.sessions.remove("large") == [small]
    assert room.counts == (2, 0)


def test_the_line_is_bounded_and_says_what_to_do() -> None:
    room = Room()
    for name in "abc":
        room.add(name, 60)
    with pytest.raises(CacheFullError, match=r"2 sessions wait for some.*--max-waiting"):
        room.add("d", 10)
    assert room.sessions.get("d") is None
    assert room.counts == (1, 2)


def test_without_a_line_memory_that_is_full_refuses_at_once() -> None:
    room = Room(replace(LIMITS, max_waiting=0))
    room.add("a", 60)
    with pytest.raises(CacheFullError, match="60 of 100 tokens of memory are in use"):
        room.add("b", 60)
    assert room.counts == (1, 0)


@pytest.mark.parametrize("num_others", [0, 2])
def test_what_will_never_fit_is_refused_even_behind_others(num_others: int) -> None:
    room = Room()
    for number in range(num_others):
        room.add(str(number), 60)
    with pytest.raises(LimitExceededError, match="--cache-mib") as caught:
        room.add("a", 101)
    assert not isinstance(caught.value, CacheFullError)


def test_those_who_wait_count_as_sessions() -> None:
    room = Room(replace(LIMITS, max_sessions=2))
    room.add("a", 60)
    room.add("b", 60)
    with pytest.raises(LimitExceededError, match=r"2 sessions are open.*--max-sessions"):
        room.sessions.check_new("c")
    with pytest.raises(DuplicateSessionError):
        room.sessions.check_new("b")


def test_who_gives_up_waiting_is_told_once_and_makes_way() -> None:
    room = Room()
    room.add("a", 60)
    large, small = room.add("large", 60), room.add("small", 10)
    assert room.sessions.give_up("large") == [small]
    assert room.sessions.give_up("large") == []
    assert ["--max-wait" in str(error) for error in large.errors] == [True]
    assert room.sessions.remove("large") == []
    assert room.counts == (2, 0)


def test_who_does_not_wait_has_nothing_to_give_up() -> None:
    room = Room()
    task = room.add("a", 60)
    assert room.sessions.give_up("a") == []
    assert room.sessions.give_up("unknown") == []
    assert not task.failed


def test_turns_go_round_and_those_without_one_keep_their_places() -> None:
    room = Room()
    first, second, third = (room.add(name, 10) for name in "abc")
    room.sessions.took_turn([first, third])
    assert list(room.sessions.due(lambda _: True)) == [second, first, third]


def test_only_open_sessions_are_due() -> None:
    room = Room()
    task = room.add("a", 60)
    room.add("b", 60)
    assert list(room.sessions.due(lambda _: True)) == [task]
    task.failed = True
    assert list(room.sessions.due(lambda _: True)) == []


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 100), st.integers(0, 2)), max_size=60))
@settings(deadline=None)
def test_whatever_comes_and_goes_nobody_is_forgotten(steps: list[tuple[int, int, int]]) -> None:
    room = Room()
    tasks: dict[str, Task] = {}
    for number, capacity, action in steps:
        name = str(number)
        if name not in tasks:
            try:
                tasks[name] = room.add(name, capacity)
            except LimitExceededError:
                assert sum(room.counts) == 5 or room.sessions.num_waiting == 2
        elif action:
            del tasks[name]
            room.sessions.remove(name)
        else:
            room.sessions.give_up(name)
        waiting = [task for task in tasks.values() if task.slot is None and not task.failed]
        assert room.sessions.num_waiting == len(waiting)
        # Somebody who waits always has somebody to wait for.
        assert not waiting or room.engine.num_open
    for name in tasks:
        room.sessions.remove(name)
    assert room.counts == (0, 0)
    assert room.engine.usage.num_reserved == 0


@given(st.floats(0.0, 10.0), st.lists(st.integers(0, 300), min_size=1, max_size=9))
def test_shares_add_up_to_the_whole_and_follow_the_tokens(
    seconds: float, num_tokens: list[int]
) -> None:
    parts = shares(seconds, num_tokens)
    assert sum(parts) == pytest.approx(seconds)
    assert all(
        part == pytest.approx(seconds * max(1, num) / sum(max(1, one) for one in num_tokens))
        for part, num in zip(parts, num_tokens, strict=True)
    )
