"""Events of /decode: in the order of the orchestrator's, with the texts of tokens."""

import httpx
import orjson
import pytest

from amusd.v1 import draft_pb2, model_pb2, orchestrator_pb2, verify_pb2
from tests.gateway.scripted_orchestrator import (
    MODEL,
    Request,
    Response,
    ScriptedOrchestrator,
    chunk,
    completion,
    served_gateway,
)

TEXTS = {7: b" a", 8: b" b", 9: b"\xc3"}


def live(seconds: float, tokens: tuple[int, ...] = (), **message: object) -> Response:
    return Response(
        event=orchestrator_pb2.LiveEvent(
            event=orchestrator_pb2.TimelineEvent(seconds=seconds, **message),  # type: ignore[arg-type]
            texts=[orchestrator_pb2.TokenText(token_id=one, text=TEXTS[one]) for one in tokens],
        )
    )


def events_of(request: Request) -> list[Response]:
    assert request.stream_timeline
    assert request.text == "Hi"
    branch = model_pb2.Branch(position=4, token_id=9, token_ids=[7])
    proposal = draft_pb2.Proposal(
        position=3, token_ids=[7, 8], source=model_pb2.DRAFT_SOURCE_LOOKUP, branches=[branch],
        device_seconds=0.25,
    )  # fmt: skip
    verdict = verify_pb2.Verdict(
        position=3, num_checked=2, num_accepted=1, next_token_id=9, device_seconds=0.5
    )
    rollback = draft_pb2.RollbackRequest(epoch=1, verified_position=5, branch_token_ids=[7])
    return [
        live(0.1, (7, 8, 9), proposal=proposal),
        live(0.1, forward=verify_pb2.VerifyProposals(position=3, token_ids=[7, 8])),
        live(0.2, verdict=verdict),
        live(0.2, rollback=rollback),
        chunk(" a\N{REPLACEMENT CHARACTER}"),
        completion(),
    ]


async def test_events_come_with_the_texts_of_their_tokens() -> None:
    async with (
        served_gateway(ScriptedOrchestrator(events_of)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=20) as client,
    ):
        answer = await client.post("/decode", json={"model": MODEL, "prompt": "Hi"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = [one.removeprefix("data: ") for one in answer.text.split("\n\n") if one]
    assert parts.pop() == "[DONE]"
    proposal, verdict, rollback, text, end = map(orjson.loads, parts)
    a, b, c = ({"id": one, "text": TEXTS[one].decode(errors="replace")} for one in (7, 8, 9))
    assert proposal == {
        "event": "proposal", "seconds": 0.1, "epoch": 0, "position": 3, "tokens": [a, b],
        "source": "lookup", "branches": [{"position": 4, "token": c, "tokens": [a]}],
        "device_seconds": 0.25,
    }  # fmt: skip
    assert verdict == {
        "event": "verdict", "seconds": 0.2, "epoch": 0, "position": 3, "num_accepted": 1,
        "next": c, "device_seconds": 0.5,
    }  # fmt: skip
    assert rollback == {
        "event": "rollback",
        "seconds": 0.2,
        "epoch": 1,
        "position": 5,
        "branch": [a],
    }
    assert text == {"event": "text", "text": " a\N{REPLACEMENT CHARACTER}"}
    assert end["event"] == "end"
    assert end["finish_reason"] == "stop"


@pytest.mark.parametrize("more", [{"n": 2}, {"prompt": ["Hi", "Ho"]}])
async def test_several_outputs_cannot_be_watched(more: dict[str, object]) -> None:
    async with (
        served_gateway() as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=20) as client,
    ):
        answer = await client.post("/decode", json={"model": MODEL, "prompt": "Hi", **more})
    assert answer.status_code == 400
    assert "one output can be watched" in answer.json()["error"]["message"]


async def test_the_page_learns_what_is_served() -> None:
    async with (
        served_gateway() as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=20) as client,
    ):
        answer = await client.get("/server")
        page = await client.get("/")
    assert answer.json()["verify_model"] == {"name": MODEL, "num_parameters": 0}
    assert answer.json()["draft_model"] is None
    assert "AMUSD" in page.text
