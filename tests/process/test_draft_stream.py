"""The draft service spoken to directly, as the orchestrator does."""

import collections
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from amusd.engine.synthetic import SyntheticModel
from amusd.v1 import draft_pb2 as pb
from amusd.v1 import draft_pb2_grpc as rpc
from tests.process.services import DRAFT_MODEL, Trio

pytestmark = pytest.mark.process

PROMPT = [5, 6, 7]
MODEL = SyntheticModel.parse(DRAFT_MODEL)


def drafted(tokens: list[int], number: int) -> list[int]:
    """Return what the draft writes after ``tokens``."""
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

    def advance(self, position: int, *tokens: int, epoch: int = 0) -> None:
        advance = pb.ProposeAdvance(epoch=epoch, position=position, token_ids=tokens)
        self._requests.put(pb.ProposeRequest(advance=advance))

    def rollback(self, epoch: int, verified_position: int, token: int) -> int:
        request = pb.RollbackRequest(
            session_id="stream",
            epoch=epoch,
            verified_position=verified_position,
            corrected_token_id=token,
        )
        return self.stub.Rollback(request, timeout=10).num_dropped

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


def tokens_of(proposals: list[pb.Proposal]) -> list[int]:
    return [token for proposal in proposals for token in proposal.token_ids]


def test_it_drafts_without_being_asked_up_to_its_lookahead(stream: Stream) -> None:
    proposals = stream.open().proposals(4)
    assert tokens_of(proposals) == drafted(PROMPT, 4)
    assert [proposal.position for proposal in proposals] == [3, 4, 5, 6]
    assert all(proposal.num_steps and proposal.draft_seconds > 0 for proposal in proposals)


def test_tokens_are_collected_into_one_proposal_if_so_asked(stream: Stream) -> None:
    (proposal,) = stream.open(tokens_per_proposal=4).proposals(4)
    assert list(proposal.token_ids) == drafted(PROMPT, 4)


def test_an_advance_lets_it_go_on(stream: Stream) -> None:
    own = drafted(PROMPT, 6)
    stream.open().proposals(4)
    stream.advance(3, *own[:2])
    assert tokens_of(stream.proposals(2)) == own[4:]


def test_a_rollback_goes_on_from_the_corrected_token_in_the_new_epoch(stream: Stream) -> None:
    own = drafted(PROMPT, 4)
    stream.open().proposals(4)
    corrected = (own[1] + 1) % 512
    assert stream.rollback(1, 5, corrected) == 3
    proposals = stream.proposals(4)
    assert tokens_of(proposals) == drafted([*PROMPT, own[0], corrected], 4)
    assert {proposal.epoch for proposal in proposals} == {1}
    assert proposals[0].position == 5


def test_a_draft_that_lags_behind_takes_final_tokens_over(stream: Stream) -> None:
    stream.open(lookahead=1).proposals(1)
    own = drafted(PROMPT, 1)
    stream.advance(3, own[0], 11, 12)
    (proposal,) = stream.proposals(1)
    assert proposal.position == 6
    assert list(proposal.token_ids) == drafted([*PROMPT, own[0], 11, 12], 1)


def test_an_advance_of_an_old_epoch_is_ignored(stream: Stream) -> None:
    own = drafted(PROMPT, 4)
    stream.open().proposals(4)
    stream.rollback(1, 4, own[0])
    stream.proposals(4)
    stream.advance(3, 1, 2, 3, epoch=0)
    stream.advance(4, drafted([*PROMPT, own[0]], 1)[0], epoch=1)
    assert len(tokens_of(stream.proposals(1))) == 1


BAD_OPENS: dict[str, Any] = {
    "an empty prompt": ({"token_ids": ()}, grpc.StatusCode.INVALID_ARGUMENT),
    "a token outside": ({"token_ids": (512,)}, grpc.StatusCode.INVALID_ARGUMENT),
    "no room": ({"max_position": 3}, grpc.StatusCode.INVALID_ARGUMENT),
    "no look-ahead": ({"lookahead": 0}, grpc.StatusCode.INVALID_ARGUMENT),
    "too much look-ahead": ({"lookahead": 17}, grpc.StatusCode.RESOURCE_EXHAUSTED),
    "proposals over the look-ahead": (
        {"tokens_per_proposal": 5},
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "a prompt over the context": (
        {"token_ids": [1] * 600, "max_position": 700},
        grpc.StatusCode.RESOURCE_EXHAUSTED,
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
    "ahead of what was drafted": ((1, 9, 1), grpc.StatusCode.FAILED_PRECONDITION, "ahead"),
    "behind what is verified": ((1, 3, 1), grpc.StatusCode.FAILED_PRECONDITION, "behind"),
    "position zero": ((1, 0, 1), grpc.StatusCode.INVALID_ARGUMENT, "verified_position"),
    "a token outside": ((1, 4, 512), grpc.StatusCode.INVALID_ARGUMENT, "outside"),
}


@pytest.mark.parametrize("case", BAD_ROLLBACKS)
def test_a_bad_rollback_is_refused_and_changes_nothing(stream: Stream, case: str) -> None:
    arguments, status, words = BAD_ROLLBACKS[case]
    stream.open().proposals(4)
    with pytest.raises(grpc.RpcError) as caught:
        stream.rollback(*arguments)
    assert caught.value.code() is status
    assert words in str(caught.value.details())
    own = drafted(PROMPT, 5)
    stream.advance(3, own[0])
    assert tokens_of(stream.proposals(1)) == own[4:]


def test_a_rollback_of_an_unknown_session_is_not_found(stream: Stream) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stream.rollback(1, 4, 1)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_close_ends_the_stream_and_frees_the_session(stream: Stream) -> None:
    stream.open().proposals(4)
    stream.close()
    assert stream.is_over()
    info = stream.stub.GetDraftInfo(pb.GetDraftInfoRequest(), timeout=10)
    assert info.num_sessions == 0
