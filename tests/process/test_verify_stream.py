"""The verify service called directly, as an orchestrator does."""

import collections
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from amusd.v1 import verify_pb2 as pb
from amusd.v1 import verify_pb2_grpc as rpc
from amusd.v1.sampling_pb2 import LogprobsOptions, Sampling, SequenceContext
from tests.process.services import VERIFY_MODEL, Trio
from tests.process.synthetic_models import expected_output

pytestmark = pytest.mark.process

PROMPT = (5, 6, 7)
OWN = expected_output(VERIFY_MODEL, PROMPT, 20)


class Stream:
    """A Verify stream whose requests are sent one by one."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[pb.VerifyRequest | None] = queue.SimpleQueue()
        self.call = rpc.VerifyServiceStub(channel).Verify(
            iter(self._requests.get, None), timeout=20
        )
        self._responses = iter(self.call)

    def open(self, session_id: str = "stream", **fields: object) -> "Stream":
        values = {"token_ids": PROMPT, "max_position": 100} | fields
        opening = pb.VerifyOpen(session_id=session_id, **values)  # type: ignore[arg-type]
        self._requests.put(pb.VerifyRequest(open=opening))
        return self

    def propose(self, position: int, *tokens: int, epoch: int = 0) -> None:
        proposals = pb.VerifyProposals(epoch=epoch, position=position, token_ids=tokens)
        self._requests.put(pb.VerifyRequest(proposals=proposals))

    def close(self) -> None:
        self._requests.put(pb.VerifyRequest(close=pb.VerifyClose()))

    def end(self) -> None:
        self._requests.put(None)
        self.call.cancel()  # type: ignore[no-untyped-call]

    def verdict(self) -> pb.Verdict:
        return next(self._responses).verdict

    def is_over(self) -> bool:
        return next(self._responses, None) is None

    def refused(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            collections.deque(self._responses, maxlen=0)
        details = str(caught.value.details())
        assert "\n" not in details
        return caught.value.code(), details


@pytest.fixture
def channel(trio: Trio) -> Iterator[grpc.Channel]:
    with trio.verify.channel() as opened:
        yield opened


@pytest.fixture
def stream(channel: grpc.Channel) -> Iterator[Stream]:
    made = Stream(channel)
    yield made
    made.end()


def num_sessions(channel: grpc.Channel) -> int:
    request = pb.GetVerifyInfoRequest()
    return rpc.VerifyServiceStub(channel).GetVerifyInfo(request, timeout=10).num_sessions


def test_an_open_is_answered_with_the_first_token(stream: Stream) -> None:
    verdict = stream.open().verdict()
    assert (verdict.position, verdict.num_checked, verdict.num_accepted) == (3, 0, 0)
    assert verdict.next_token_id == OWN[0]
    assert verdict.pass_seconds >= 0.004


def test_verdicts_hold_no_pass_times_by_default(stream: Stream) -> None:
    assert not stream.open().verdict().passes
    stream.propose(4, *OWN[1:3])
    assert not stream.verdict().passes


def test_verdicts_hold_the_times_of_their_passes_on_request(stream: Stream) -> None:
    verdicts = [stream.open(record_times=True).verdict()]
    stream.propose(4, *OWN[1:3])
    verdicts.append(stream.verdict())
    for verdict in verdicts:
        [one] = verdict.passes  # the prompt is shorter than a chunk
        assert one.seconds == pytest.approx(verdict.pass_seconds)
    first, second = (verdict.passes[0] for verdict in verdicts)
    ended = first.started_unix_nanos + first.seconds * 1e9
    assert ended <= second.started_unix_nanos + 1e6  # the two clocks differ by microseconds


def test_the_first_verdict_holds_the_time_of_every_chunk_of_the_prompt(stream: Stream) -> None:
    prompt = [(7 * index) % 512 for index in range(300)]  # more than the prefill budget
    verdict = stream.open(token_ids=prompt, max_position=400, record_times=True).verdict()
    assert len(verdict.passes) > 1
    seconds = sum(one.seconds for one in verdict.passes)
    assert seconds == pytest.approx(verdict.pass_seconds)
    starts = [one.started_unix_nanos for one in verdict.passes]
    assert starts == sorted(starts)


def test_a_pass_accepts_the_right_tokens_and_corrects_the_first_wrong_one(stream: Stream) -> None:
    stream.open().verdict()
    stream.propose(4, OWN[1], OWN[2], (OWN[3] + 1) % 512, OWN[4])
    verdict = stream.verdict()
    assert (verdict.position, verdict.num_checked, verdict.num_accepted) == (4, 4, 2)
    assert verdict.next_token_id == OWN[3]


def test_proposals_that_arrive_during_a_pass_are_checked_together_in_the_next(
    stream: Stream,
) -> None:
    stream.open()
    for offset in range(10):  # all sent while the prompt is computed
        stream.propose(3 + offset, OWN[offset])
    written, passes = 0, 0
    while written < 10:
        verdict = stream.verdict()
        assert verdict.num_accepted == verdict.num_checked
        written += verdict.num_accepted + 1
        passes += 1
    assert passes <= 4


def test_an_empty_proposal_asks_for_a_pass_without_proposals(stream: Stream) -> None:
    stream.open().verdict()
    stream.propose(4)
    verdict = stream.verdict()
    assert (verdict.position, verdict.num_checked, verdict.next_token_id) == (4, 0, OWN[1])


def test_proposals_of_an_old_epoch_are_ignored(stream: Stream) -> None:
    stream.open().verdict()
    stream.propose(4, (OWN[1] + 1) % 512)
    assert stream.verdict().num_accepted == 0
    stream.propose(5, OWN[2])  # still epoch 0, which the rejection has ended
    stream.propose(5, OWN[2], epoch=1)
    verdict = stream.verdict()
    assert (verdict.epoch, verdict.position, verdict.num_accepted) == (1, 5, 1)


def test_the_session_ends_at_its_last_position(stream: Stream) -> None:
    stream.open(max_position=6).verdict()
    stream.propose(4, *OWN[1:6])
    verdict = stream.verdict()
    assert verdict.position + verdict.num_accepted + 1 == 6


def test_a_close_ends_the_stream_and_frees_the_session(
    stream: Stream, channel: grpc.Channel
) -> None:
    stream.open().verdict()
    assert num_sessions(channel) == 1
    stream.close()
    assert stream.is_over()
    assert num_sessions(channel) == 0


BAD_OPENS: dict[str, Any] = {
    "an empty prompt": ({"token_ids": ()}, grpc.StatusCode.INVALID_ARGUMENT, "at least one"),
    "a token outside": ({"token_ids": (512,)}, grpc.StatusCode.INVALID_ARGUMENT, "outside"),
    "no room": ({"max_position": 3}, grpc.StatusCode.INVALID_ARGUMENT, "no room"),
    "too long": ({"max_position": 601}, grpc.StatusCode.INVALID_ARGUMENT, "up to 600"),
    "another vocabulary": (
        {"vocabulary_fingerprint": "0" * 64},
        grpc.StatusCode.INVALID_ARGUMENT,
        "restart the orchestrator",
    ),
    "no name": ({"session_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "1 to 128"),
    "no seed": (
        {"sampling": Sampling(temperature=1.0)},
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling.seed is unset",
    ),
    "a bias outside": (
        {"sampling": Sampling(logit_bias={512: 1.0})},
        grpc.StatusCode.INVALID_ARGUMENT,
        "logit_bias: token id 512 is outside",
    ),
    "a prompt beyond the tokens": (
        {"context": SequenceContext(num_prompt_tokens=4)},
        grpc.StatusCode.INVALID_ARGUMENT,
        "opened with 3 tokens",
    ),
    "too many likeliest tokens": (
        {"logprobs": LogprobsOptions(num_top=21)},
        grpc.StatusCode.INVALID_ARGUMENT,
        "use 0 to 20",
    ),
}


@pytest.mark.parametrize("case", BAD_OPENS)
def test_a_bad_open_is_refused(stream: Stream, channel: grpc.Channel, case: str) -> None:
    fields, status, message = BAD_OPENS[case]
    code, details = stream.open(**fields).refused()
    assert code is status
    assert message in details
    assert num_sessions(channel) == 0


def test_a_stream_that_does_not_begin_with_an_open_is_refused(stream: Stream) -> None:
    stream.propose(3, 1)
    code, details = stream.refused()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "first request" in details


def test_a_second_open_ends_the_stream(stream: Stream) -> None:
    stream.open().open("another")
    code, details = stream.refused()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "open already" in details


def test_a_gap_ends_the_stream(stream: Stream) -> None:
    stream.open().verdict()
    stream.propose(6, 1)
    code, details = stream.refused()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "gap after 4" in details


def test_a_proposed_token_outside_the_vocabulary_ends_the_stream(stream: Stream) -> None:
    stream.open().verdict()
    stream.propose(4, 600)
    code, details = stream.refused()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "outside the vocabulary" in details


def test_proposals_that_contradict_each_other_end_the_stream(stream: Stream) -> None:
    stream.open()
    stream.propose(3, *OWN[:8])
    stream.propose(3, *OWN[:7], (OWN[7] + 1) % 512)
    code, details = stream.refused()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "contradict" in details


def test_a_late_proposal_that_differs_ends_only_its_epoch(stream: Stream) -> None:
    stream.open().verdict()
    stream.propose(3, (OWN[0] + 1) % 512, 17)
    stream.propose(4, OWN[1], epoch=1)
    verdict = stream.verdict()
    assert (verdict.epoch, verdict.position, verdict.num_accepted) == (1, 4, 1)


def test_more_proposed_tokens_than_may_wait_end_the_stream(stream: Stream) -> None:
    stream.open()
    stream.propose(3, *([1] * 599))
    code, details = stream.refused()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "propose less" in details


def test_a_session_id_in_use_is_refused_and_its_owner_goes_on(
    stream: Stream, channel: grpc.Channel
) -> None:
    stream.open("taken").verdict()
    second = Stream(channel).open("taken")
    code, _ = second.refused()
    second.end()
    assert code is grpc.StatusCode.ALREADY_EXISTS
    stream.propose(4, OWN[1])
    assert stream.verdict().num_accepted == 1


def test_a_bad_stream_leaves_the_others_alone(stream: Stream, channel: grpc.Channel) -> None:
    stream.open("good").verdict()
    bad = Stream(channel).open("bad")
    bad.propose(50, 1)
    assert bad.refused()[0] is grpc.StatusCode.FAILED_PRECONDITION
    bad.end()
    for offset in range(1, 6):
        stream.propose(3 + offset, OWN[offset])
    position = 4
    while position < 9:
        verdict = stream.verdict()
        assert verdict.num_accepted == verdict.num_checked
        position = verdict.position + verdict.num_accepted + 1


def test_more_sessions_than_the_limit_are_refused(channel: grpc.Channel) -> None:
    streams = [Stream(channel).open(f"session {number}") for number in range(64)]
    try:
        for stream in streams:
            stream.verdict()
        late = Stream(channel).open("late")
        code, details = late.refused()
        late.end()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--max-sessions" in details
    finally:
        for stream in streams:
            stream.end()
