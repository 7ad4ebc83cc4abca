"""Who opens the next session: laws of the choice, for one orchestrator and for several."""

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
    """Return the load of a replica that told of sessions, with some opened since."""
    found = ReplicaLoad()
    for _ in range(num_own):
        found.opened()
    found.reported(num_reported, num_own)
    for _ in range(num_since):
        found.opened()
    return found


def candidates(*loads: ReplicaLoad) -> list[Candidate]:
    return [Candidate(f"10.0.0.{number}:50052", one) for number, one in enumerate(loads)]


loads = st.builds(load, st.integers(0, 60), st.integers(0, 20), st.integers(0, 20))
pools = st.lists(loads, max_size=8).map(lambda found: candidates(*found))


@given(pools, st.sets(st.integers(0, 7)), st.integers())
def test_the_choice_is_allowed_and_nobody_allowed_has_less(
    pool: list[Candidate], avoided: set[int], seed: int
) -> None:
    avoid = {f"10.0.0.{number}:50052" for number in avoided}
    allowed = [one for one in pool if one.address not in avoid]
    chosen = least_loaded(pool, avoid, random.Random(seed))
    if not allowed:
        assert chosen is None
        return
    assert chosen in allowed
    num_alike = ReplicaLoad.num_alike(one.load for one in pool)
    least = min(one.load.expected(num_alike) for one in allowed)
    assert chosen.load.expected(num_alike) == least


@given(st.integers(1, 8), st.integers(0, 200), st.integers())
def test_a_burst_that_nobody_tells_of_spreads_evenly(
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
def test_orchestrators_that_share_nothing_fill_a_newcomer_only_up_to_the_others(
    num_orchestrators: int, num_replicas: int, num_each: int, seed: int
) -> None:
    """All were told the same: ``num_each`` sessions of each orchestrator on each old replica."""
    chance = random.Random(seed)
    views = [
        candidates(
            *(load(num_each * num_orchestrators, num_each) for _ in range(num_replicas)), load()
        )
        for _ in range(num_orchestrators)
    ]
    for _ in range(2 * num_each):
        for view in views:
            chosen = least_loaded(view, (), chance)
            assert chosen is not None
            chosen.load.opened()
    totals = [sum(view[place].load.num_own for view in views) for place in range(num_replicas + 1)]
    assert totals[-1] <= max(totals[:-1]) + num_orchestrators


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 50), st.integers(0, 5))
def test_own_sessions_are_counted_to_the_last_one(
    steps: list[bool], num_reported: int, num_own: int
) -> None:
    found = load(num_reported, num_own)
    num_open, num_opened = num_own, num_own
    for opens in steps:
        if opens:
            found.opened()
            num_open, num_opened = num_open + 1, num_opened + 1
        elif num_open:
            found.closed()
            num_open -= 1
        assert (found.num_own, found.num_opened) == (num_open, num_opened)
        assert found.num_sessions == max(num_open, num_reported + num_open - num_own)
        assert found.expected(1.0) == found.num_sessions


def test_a_session_is_not_counted_out_twice() -> None:
    found = load(num_own=1)
    found.closed()
    with pytest.raises(ValueError, match="not counted in"):
        found.closed()
    assert found.num_own == 0


def test_ties_are_broken_at_random() -> None:
    pool = candidates(load(), load(), load())
    chance = random.Random(0)
    chosen = {least_loaded(pool, (), chance) for _ in range(100)}
    assert chosen == set(pool)


def test_a_lost_replica_has_no_sessions_but_ours() -> None:
    found = load(num_reported=30, num_own=3)
    found.lost()
    assert found.num_sessions == 3


@given(st.sampled_from(["dtype", "numerics", "weight_format", "weights_fingerprint"]))
def test_what_may_write_other_tokens_is_named(name: str) -> None:
    other = replace(MODEL, **{name: "another"})  # type: ignore[arg-type]
    found = explain_mismatch(other, MODEL)
    assert found is not None
    assert "another" in found


def test_another_vocabulary_is_named() -> None:
    for vocabulary in (Vocabulary.of(["a", "b"]), Vocabulary.of(["a", "b", "d"]), Vocabulary(3)):
        found = explain_mismatch(replace(MODEL, vocabulary=vocabulary), MODEL)
        assert found is not None
        assert "vocabulary" in found


def test_the_name_counts_only_where_the_weights_are_not_known() -> None:
    folder = replace(MODEL, name="/models/big")
    assert explain_mismatch(folder, MODEL) is None
    found = explain_mismatch(replace(folder, weights_fingerprint=""), MODEL)
    assert found is not None
    assert "/models/big" in found
    assert explain_mismatch(replace(MODEL, weights_fingerprint=""), MODEL) is None


def test_where_it_runs_does_not_matter() -> None:
    assert explain_mismatch(replace(MODEL, device="cuda:0", context_length=9), MODEL) is None
