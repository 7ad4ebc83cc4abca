"""Load balancing: properties of the choice, for one orchestrator and for several."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.fleet.load_balancing import Candidate, ReplicaLoad, explain_mismatch, least_loaded
from amusd.fleet.model_description import ModelDescription
from amusd.fleet.vocabulary import Vocabulary

MODEL = ModelDescription(
    name="big",
    device="cpu",
    dtype="float32",
    num_parameters=7,
    context_length=64,
    output_size=3,
    vocabulary=Vocabulary.of(["a", "b", "c"]),
    numerics="fast",
    weight_format="compact",
    weights_fingerprint="f" * 32,
)


def load(num_reported: int = 0, num_own: int = 0, num_since: int = 0) -> ReplicaLoad:
    """Return the load of a replica after a report and ``num_since`` own sessions after it.

    The report counts ``num_reported`` sessions, ``num_own`` of them our own.
    """
    made = ReplicaLoad()
    for _ in range(num_own):
        made.opened()
    made.reported(num_reported, num_own)
    for _ in range(num_since):
        made.opened()
    return made


def candidates(*loads: ReplicaLoad) -> list[Candidate]:
    return [Candidate(f"10.0.0.{number}:50052", one) for number, one in enumerate(loads)]


loads = st.builds(load, st.integers(0, 60), st.integers(0, 20), st.integers(0, 20))
pools = st.lists(loads, max_size=8).map(lambda of_pool: candidates(*of_pool))


@given(pools, st.sets(st.integers(0, 7)), st.integers())
def test_the_choice_is_allowed_and_no_allowed_replica_has_less_load(
    pool: list[Candidate], avoided: set[int], seed: int
) -> None:
    avoid = {f"10.0.0.{number}:50052" for number in avoided}
    allowed = [one for one in pool if one.address not in avoid]
    chosen = least_loaded(pool, avoid, random.Random(seed))
    if not allowed:
        assert chosen is None
        return
    assert chosen in allowed
    num_orchestrators = ReplicaLoad.estimate_num_orchestrators(one.load for one in pool)
    fewest = min(one.load.expected(num_orchestrators) for one in allowed)
    assert chosen.load.expected(num_orchestrators) == fewest


@given(st.integers(1, 8), st.integers(0, 200), st.integers())
def test_a_burst_between_two_reports_spreads_evenly(
    num_replicas: int, num_sessions: int, seed: int
) -> None:
    pool = candidates(*(load() for _ in range(num_replicas)))
    for _ in range(num_sessions):
        chosen = least_loaded(pool, (), random.Random(seed))
        assert chosen is not None
        chosen.load.opened()
    opened = [one.load.num_opened for one in pool]
    assert sum(opened) == num_sessions
    assert max(opened) - min(opened) <= 1


@given(st.integers(2, 6), st.integers(1, 5), st.integers(2, 40), st.integers())
def test_several_orchestrators_do_not_overload_a_new_replica(
    num_orchestrators: int, num_replicas: int, num_each: int, seed: int
) -> None:
    """Each old replica reports ``num_each`` sessions of each orchestrator; the new one is idle."""
    rng = random.Random(seed)
    views = [
        candidates(
            *(load(num_each * num_orchestrators, num_each) for _ in range(num_replicas)), load()
        )
        for _ in range(num_orchestrators)
    ]
    for _ in range(2 * num_each):
        for view in views:
            chosen = least_loaded(view, (), rng)
            assert chosen is not None
            chosen.load.opened()
    totals = [sum(view[index].load.num_own for view in views) for index in range(num_replicas + 1)]
    assert totals[-1] <= max(totals[:-1]) + num_orchestrators


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 50), st.integers(0, 5))
def test_own_sessions_are_counted_exactly(
    steps: list[bool], num_reported: int, num_own: int
) -> None:
    one = load(num_reported, num_own)
    num_open, num_opened = num_own, num_own
    for opens in steps:
        if opens:
            one.opened()
            num_open, num_opened = num_open + 1, num_opened + 1
        elif num_open:
            one.closed()
            num_open -= 1
        assert (one.num_own, one.num_opened) == (num_open, num_opened)
        assert one.num_sessions == max(num_open, num_reported + num_open - num_own)
        assert one.expected(1.0) == one.num_sessions


def test_closing_more_sessions_than_are_open_raises() -> None:
    one = load(num_own=1)
    one.closed()
    with pytest.raises(ValueError, match="no session is open"):
        one.closed()
    assert one.num_own == 0


@given(st.lists(st.tuples(loads, st.booleans()), min_size=1, max_size=8), st.integers())
def test_a_late_replica_is_taken_only_if_all_are_late(
    drawn: list[tuple[ReplicaLoad, bool]], seed: int
) -> None:
    pool = [Candidate(str(number), one, late) for number, (one, late) in enumerate(drawn)]
    chosen = least_loaded(pool, (), random.Random(seed))
    assert chosen is not None
    assert chosen.is_late == all(late for _, late in drawn)


def test_ties_are_broken_at_random() -> None:
    pool = candidates(load(), load(), load())
    rng = random.Random(0)
    chosen = {least_loaded(pool, (), rng) for _ in range(100)}
    assert chosen == set(pool)


def test_after_its_end_a_replica_counts_only_our_sessions() -> None:
    one = load(num_reported=30, num_own=3)
    one.lost()
    assert one.num_sessions == 3


@given(st.sampled_from(["dtype", "numerics", "weight_format", "weights_fingerprint"]))
def test_a_property_that_may_change_the_output_is_named_if_it_differs(name: str) -> None:
    other = replace(MODEL, **{name: "another"})  # type: ignore[arg-type]
    mismatch = explain_mismatch(other, MODEL)
    assert mismatch is not None
    assert "another" in mismatch


def test_a_different_vocabulary_is_named() -> None:
    for vocabulary in (Vocabulary.of(["a", "b"]), Vocabulary.of(["a", "b", "d"]), Vocabulary(3)):
        mismatch = explain_mismatch(replace(MODEL, vocabulary=vocabulary), MODEL)
        assert mismatch is not None
        assert "vocabulary" in mismatch


def test_names_are_compared_only_without_weights_fingerprints() -> None:
    folder = replace(MODEL, name="/models/big")
    assert explain_mismatch(folder, MODEL) is None
    mismatch = explain_mismatch(replace(folder, weights_fingerprint=""), MODEL)
    assert mismatch is not None
    assert "/models/big" in mismatch
    assert explain_mismatch(replace(MODEL, weights_fingerprint=""), MODEL) is None


def test_device_and_context_may_differ() -> None:
    assert explain_mismatch(replace(MODEL, device="cuda:0", context_length=9), MODEL) is None
