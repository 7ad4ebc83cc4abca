"""Which branch is drafted next."""

from hypothesis import given
from hypothesis import strategies as st

from amusd.policy.branch_selection import Candidate, best_candidate

candidates = st.lists(
    st.builds(
        Candidate,
        position=st.integers(0, 50),
        token=st.integers(0, 9),
        distance=st.integers(0, 20),
        rank=st.integers(0, 4),
    ),
    min_size=1,
)


def test_without_candidates_there_is_none() -> None:
    assert best_candidate([]) is None


@given(candidates)
def test_none_is_better_than_the_chosen_one_in_distance_and_rank(found: list[Candidate]) -> None:
    best = best_candidate(found)
    assert best in found
    assert not any(
        other.distance <= best.distance
        and other.rank <= best.rank
        and (other.distance, other.rank) != (best.distance, best.rank)
        for other in found
    )


def test_a_second_choice_here_can_be_worth_more_than_a_first_choice_far_ahead() -> None:
    near, far = Candidate(10, 1, 0, 1), Candidate(16, 2, 6, 0)
    assert best_candidate([far, near]) == near
