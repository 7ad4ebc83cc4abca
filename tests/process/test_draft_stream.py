"""The draft service called directly, as an orchestrator does."""

import collections
import queue
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import grpc
import pytest

from amusd.engine.synthetic import SyntheticModel
from amusd.v1 import draft_pb2 as pb
from amusd.v1 import draft_pb2_grpc as rpc
from amusd.v1.sampling_pb2 import Sampling
from tests.process.rollbacks import Rollbacks
from tests.process.services import DRAFT_MODEL, Trio

pytestmark = pytest.mark.process

PROMPT = [5, 6, 7]
MODEL = SyntheticModel.parse(DRAFT_MODEL)


def drafted(tokens: list[int], number: int) -> list[int]:
    """Return the ``number`` tokens that the draft model writes after ``tokens``."""
    written = list(tokens)
    for _ in range(number):
        written.append(MODEL.next_token(written))
    return written[len(tokens) :]


class Stream:
    """A Propose stream whose requests are sent one by one."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[pb.ProposeRequest | None] = queue.SimpleQueue()
        self.stub = rpc.DraftServiceStub(channel)
        self.call = self.stub.Propose(iter(self._requests.get, None), timeout=20)
        self._responses = iter(self.call)

    def open(self, session_id: str = "stream", **fields: object) -> "Stream":
        values = {"token_ids": PROMPT, "max_position": 100, "lookahead": 4} | fields
        opening = pb.ProposeOpen(session_id=session_id, **values)  # type: ignore[arg-type]
        self._requests.put(pb.ProposeRequest(open=opening))
        return self

    def advance(self, position: int, *tokens: int, **fields: int) -> None:
        advance = pb.ProposeAdvance(position=position, token_ids=tokens, **fields)
        self._requests.put(pb.ProposeRequest(advance=advance))

    def proposals(self, num_tokens: int) -> list[pb.Proposal]:
        """Read proposals until they hold ``num_tokens`` tokens."""
        read: list[pb.Proposal] = []
        while sum(len(one.token_ids) for one in read) < num_tokens:
            read.append(next(self._responses).proposal)
        return read

    def close(self) -> None:
        self._requests.put(pb.ProposeRequest(close=pb.ProposeClose()))

    def end(self) -> None:
        self._requests.put(None)
        self.call.cancel()  # type: ignore[no-untyped-call]

    def is_over(self) -> bool:
        return next(self._responses, None) is None

    def refused(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            collections.deque(self._responses, maxlen=0)
        return caught.value.code(), str(caught.value.details())


@pytest.fixture
def channel(trio: Trio) -> Iterator[grpc.Channel]:
    with trio.draft.channel() as opened:
        yield opened


@pytest.fixture
def stream(channel: grpc.Channel) -> Iterator[Stream]:
    made = Stream(channel)
    yield made
    made.end()


@pytest.fixture
def rollbacks(channel: grpc.Channel) -> Iterator[Rollbacks]:
    made = Rollbacks(rpc.DraftServiceStub(channel))
    yield made
    made.end()


def tokens_of(proposals: list[pb.Proposal]) -> list[int]:
    return [token for proposal in proposals for token in proposal.token_ids]


def test_a_session_drafts_without_being_asked_up_to_its_lookahead(stream: Stream) -> None:
    proposals = stream.open().proposals(4)
    assert tokens_of(proposals) == drafted(PROMPT, 4)
    assert [proposal.position for proposal in proposals] == [3, 4, 5, 6]
    assert all(proposal.num_steps and proposal.draft_seconds > 0 for proposal in proposals)


def test_tokens_are_collected_into_one_proposal_on_request(stream: Stream) -> None:
    (proposal,) = stream.open(tokens_per_proposal=4).proposals(4)
    assert list(proposal.token_ids) == drafted(PROMPT, 4)


def test_an_advance_makes_room_for_more_tokens(stream: Stream) -> None:
    own = drafted(PROMPT, 6)
    stream.open().proposals(4)
    stream.advance(3, *own[:2])
    assert tokens_of(stream.proposals(2)) == own[4:]


def test_an_advance_changes_how_many_tokens_are_collected(stream: Stream) -> None:
    own = drafted(PROMPT, 8)
    stream.open().proposals(4)
    stream.advance(3, *own[:4], tokens_per_proposal=4)
    (proposal,) = stream.proposals(4)
    assert list(proposal.token_ids) == own[4:]


def test_proposals_hold_no_step_times_by_default(stream: Stream) -> None:
    assert not any(proposal.steps for proposal in stream.open().proposals(4))


def test_proposals_hold_the_times_of_their_steps_on_request(stream: Stream) -> None:
    proposals = stream.open(record_times=True).proposals(4)
    steps = [step for proposal in proposals for step in proposal.steps]
    assert [len(proposal.steps) for proposal in proposals] == [one.num_steps for one in proposals]
    for proposal in proposals:
        seconds = sum(step.seconds for step in proposal.steps)
        assert seconds == pytest.approx(proposal.draft_seconds)
    for step, later in pairwise(steps):
        ended = step.started_unix_nanos + step.seconds * 1e9
        # The two clocks differ by microseconds.
        assert ended <= later.started_unix_nanos + 1e6


def test_a_rollback_goes_on_from_the_corrected_token_in_the_new_epoch(
    stream: Stream, rollbacks: Rollbacks
) -> None:
    own = drafted(PROMPT, 4)
    stream.open().proposals(4)
    corrected = (own[1] + 1) % 512
    response = rollbacks.roll_back(1, 5, corrected)
    assert (response.num_dropped, response.HasField("error")) == (3, False)
    proposals = stream.proposals(4)
    assert tokens_of(proposals) == drafted([*PROMPT, own[0], corrected], 4)
    assert {proposal.epoch for proposal in proposals} == {1}
    assert proposals[0].position == 5


def test_a_rollback_says_how_many_tokens_are_collected(stream: Stream) -> None:
    own = drafted(PROMPT, 4)
    stream.open().proposals(4)
    request = pb.RollbackRequest(
        session_id="stream",
        epoch=1,
        verified_position=4,
        corrected_token_id=own[0],
        first_proposal=3,
        tokens_per_proposal=1,
    )
    (response,) = stream.stub.Rollback(iter([request]), timeout=10)
    assert response.num_dropped == 4
    assert [len(one.token_ids) for one in stream.proposals(4)] == [3, 1]


def test_one_stream_rolls_back_many_sessions_and_answers_in_order(
    channel: grpc.Channel, rollbacks: Rollbacks
) -> None:
    own = drafted(PROMPT, 4)
    names = [f"session {number}" for number in range(8)]
    streams = [Stream(channel).open(name) for name in names]
    try:
        for stream in streams:
            stream.proposals(4)
        for number, name in enumerate(names):
            rollbacks.send(1 + number, 4, own[0], name)
        answers = [rollbacks.answer() for _ in names]
        assert [one.session_id for one in answers] == names
        assert [one.epoch for one in answers] == list(range(1, 9))
        assert all((one.num_dropped, one.HasField("error")) == (4, False) for one in answers)
        for number, stream in enumerate(streams):
            proposals = stream.proposals(4)
            assert {proposal.epoch for proposal in proposals} == {1 + number}
            assert tokens_of(proposals) == drafted([*PROMPT, own[0]], 4)
    finally:
        for stream in streams:
            stream.end()


def test_the_end_of_the_requests_ends_a_rollback_stream(
    stream: Stream, rollbacks: Rollbacks
) -> None:
    stream.open().proposals(4)
    rollbacks.roll_back(1, 4, 1)
    assert rollbacks.is_over()
    assert {proposal.epoch for proposal in stream.proposals(4)} == {1}  # the session goes on


def test_a_draft_that_lags_behind_takes_final_tokens_over(stream: Stream) -> None:
    stream.open(lookahead=1).proposals(1)
    own = drafted(PROMPT, 1)
    stream.advance(3, own[0], 11, 12)
    (proposal,) = stream.proposals(1)
    assert proposal.position == 6
    assert list(proposal.token_ids) == drafted([*PROMPT, own[0], 11, 12], 1)


def test_an_advance_of_an_old_epoch_is_ignored(stream: Stream, rollbacks: Rollbacks) -> None:
    own = drafted(PROMPT, 4)
    stream.open().proposals(4)
    rollbacks.roll_back(1, 4, own[0])
    stream.proposals(4)
    stream.advance(3, 1, 2, 3, epoch=0)
    stream.advance(4, drafted([*PROMPT, own[0]], 1)[0], epoch=1)
    assert len(tokens_of(stream.proposals(1))) == 1


BAD_OPENS: dict[str, Any] = {
    "an empty prompt": ({"token_ids": ()}, grpc.StatusCode.INVALID_ARGUMENT),
    "a token outside": ({"token_ids": (512,)}, grpc.StatusCode.INVALID_ARGUMENT),
    "no room": ({"max_position": 3}, grpc.StatusCode.INVALID_ARGUMENT),
    "no look-ahead": ({"lookahead": 0}, grpc.StatusCode.INVALID_ARGUMENT),
    "too much look-ahead": ({"lookahead": 17}, grpc.StatusCode.INVALID_ARGUMENT),
    "proposals over the look-ahead": (
        {"tokens_per_proposal": 5},
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "a prompt over the context": (
        {"token_ids": [1] * 600, "max_position": 700},
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "no seed": ({"sampling": Sampling(temperature=1.0)}, grpc.StatusCode.INVALID_ARGUMENT),
    "an allowed token outside": (
        {"sampling": Sampling(allowed_token_ids=[512])},
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "another vocabulary": (
        {"vocabulary_fingerprint": "0" * 64},
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
}


@pytest.mark.parametrize("case", BAD_OPENS)
def test_a_bad_open_is_refused(stream: Stream, case: str) -> None:
    fields, status = BAD_OPENS[case]
    code, details = stream.open(**fields).refused()
    assert code is status
    assert details
    assert "\n" not in details
    info = stream.stub.GetDraftInfo(pb.GetDraftInfoRequest(), timeout=10)
    assert info.num_sessions == 0


def test_a_stream_that_does_not_begin_with_an_open_is_refused(stream: Stream) -> None:
    stream.advance(3, 1)
    code, details = stream.refused()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "first request" in details


def test_a_token_outside_the_vocabulary_in_an_advance_ends_the_stream(stream: Stream) -> None:
    stream.open().proposals(4)
    stream.advance(3, 512)
    assert stream.refused()[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_a_bad_stream_leaves_the_others_alone(stream: Stream, channel: grpc.Channel) -> None:
    stream.open("good").proposals(4)
    bad = Stream(channel).open("bad")
    bad.advance(50, 1)
    assert bad.refused()[0] is grpc.StatusCode.FAILED_PRECONDITION
    bad.end()
    own = drafted(PROMPT, 6)
    stream.advance(3, *own[:2])
    assert tokens_of(stream.proposals(2)) == own[4:]


def test_a_second_open_ends_the_stream(stream: Stream) -> None:
    assert stream.open().open("other").refused()[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_a_gap_in_the_advances_ends_the_stream(stream: Stream) -> None:
    stream.open().proposals(4)
    stream.advance(9, 1)
    assert stream.refused()[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_a_session_id_in_use_is_refused(stream: Stream, channel: grpc.Channel) -> None:
    stream.open("taken").proposals(4)
    second = Stream(channel).open("taken")
    assert second.refused()[0] is grpc.StatusCode.ALREADY_EXISTS
    second.end()
    stream.advance(3, drafted(PROMPT, 1)[0])
    assert len(stream.proposals(1)) == 1


BAD_ROLLBACKS = {
    "an old epoch": ((0, 4, 1), grpc.StatusCode.FAILED_PRECONDITION, "too old"),
    "ahead of the drafted tokens": ((1, 9, 1), grpc.StatusCode.FAILED_PRECONDITION, "ahead"),
    "behind the verified position": ((1, 3, 1), grpc.StatusCode.FAILED_PRECONDITION, "behind"),
    "position zero": ((1, 0, 1), grpc.StatusCode.INVALID_ARGUMENT, "verified_position"),
    "a token outside": ((1, 4, 512), grpc.StatusCode.INVALID_ARGUMENT, "outside"),
}


def check_refused(response: pb.RollbackResponse, status: grpc.StatusCode, message: str) -> None:
    """Check that a rollback was refused with a status and one line."""
    code: int = status.value[0]
    assert response.HasField("error")
    assert (response.error.code, response.num_dropped) == (code, 0)
    assert message in response.error.message
    assert "\n" not in response.error.message


@pytest.mark.parametrize("case", BAD_ROLLBACKS)
def test_a_bad_rollback_is_refused_and_changes_nothing(
    stream: Stream, rollbacks: Rollbacks, case: str
) -> None:
    arguments, status, message = BAD_ROLLBACKS[case]
    stream.open().proposals(4)
    check_refused(rollbacks.roll_back(*arguments), status, message)
    own = drafted(PROMPT, 5)
    stream.advance(3, own[0])
    assert tokens_of(stream.proposals(1)) == own[4:]
    # Nor does it end the stream.
    assert not rollbacks.roll_back(1, 5, own[1]).HasField("error")
    assert {proposal.epoch for proposal in stream.proposals(4)} == {1}


def test_a_rollback_of_an_unknown_session_is_not_found(
    stream: Stream, rollbacks: Rollbacks
) -> None:
    response = rollbacks.roll_back(1, 4, 1, "unknown")
    check_refused(response, grpc.StatusCode.NOT_FOUND, "'unknown'")
    stream.open().proposals(4)
    assert not rollbacks.roll_back(1, 4, 1).HasField("error")


def test_a_rollback_of_a_session_that_has_ended_is_not_found(
    stream: Stream, rollbacks: Rollbacks
) -> None:
    stream.open().proposals(4)
    stream.close()
    assert stream.is_over()
    check_refused(rollbacks.roll_back(1, 4, 1), grpc.StatusCode.NOT_FOUND, "'stream'")


def test_a_refused_rollback_leaves_the_other_sessions_of_the_stream_alone(
    stream: Stream, channel: grpc.Channel, rollbacks: Rollbacks
) -> None:
    own = drafted(PROMPT, 4)
    stream.open().proposals(4)
    other = Stream(channel).open("other")
    other.proposals(4)
    rollbacks.send(0, 4, own[0])
    rollbacks.send(1, 4, own[0], "other")
    check_refused(rollbacks.answer(), grpc.StatusCode.FAILED_PRECONDITION, "too old")
    assert rollbacks.answer().num_dropped == 4
    assert {proposal.epoch for proposal in other.proposals(4)} == {1}
    other.end()


def test_a_close_ends_the_stream_and_frees_the_session(stream: Stream) -> None:
    stream.open().proposals(4)
    stream.close()
    assert stream.is_over()
    info = stream.stub.GetDraftInfo(pb.GetDraftInfoRequest(), timeout=10)
    assert info.num_sessions == 0
