"""Rolls sessions back over a Rollback stream of a draft service, as an orchestrator does."""

import queue
from collections.abc import Iterator

from amusd.v1 import draft_pb2 as pb
from amusd.v1 import draft_pb2_grpc as rpc


class Rollbacks:
    """A Rollback stream whose requests are sent one by one, each followed by its answer."""

    def __init__(self, stub: rpc.DraftServiceStub) -> None:
        self._requests: queue.SimpleQueue[pb.RollbackRequest | None] = queue.SimpleQueue()
        self.call = stub.Rollback(iter(self._requests.get, None), timeout=60)
        self._responses: Iterator[pb.RollbackResponse] = iter(self.call)

    def send(
        self, epoch: int, verified_position: int, token: int, session_id: str = "stream"
    ) -> None:
        """Send a rollback; ``answer`` returns its answer."""
        self._requests.put(
            pb.RollbackRequest(
                session_id=session_id,
                epoch=epoch,
                verified_position=verified_position,
                corrected_token_id=token,
            )
        )

    def answer(self) -> pb.RollbackResponse:
        return next(self._responses)

    def roll_back(
        self, epoch: int, verified_position: int, token: int, session_id: str = "stream"
    ) -> pb.RollbackResponse:
        """Send a rollback and return its answer, which names the session and the epoch."""
        self.send(epoch, verified_position, token, session_id)
        response = self.answer()
        assert (response.session_id, response.epoch) == (session_id, epoch)
        return response

    def is_over(self) -> bool:
        """Close the stream; whether the service then ends it without another answer."""
        self._requests.put(None)
        return next(self._responses, None) is None

    def end(self) -> None:
        self._requests.put(None)
        self.call.cancel()  # type: ignore[no-untyped-call]
