"""How a gateway treats clients that err, leave, do not read, or come too many or too late."""

import asyncio
import contextlib
import json
import socket
import time
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from tests.gateway.scripted_orchestrator import (
    MODEL,
    ScriptedOrchestrator,
    ServedGateway,
    becomes_true,
    chunk,
    completion,
    said,
    served_gateway,
)

BODY: dict[str, Any] = {"model": MODEL, "prompt": "Hi"}
COMPLETIONS = "/v1/completions"


def http(gateway: ServedGateway) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=gateway.url, timeout=20)


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"{", 400, "no valid JSON"),
        (b"", 400, "no valid JSON"),
        (b'{"prompt": NaN}', 400, "no valid JSON"),
        (b'{"prompt": "\\ud800"}', 400, "no valid JSON"),
        (b"[" * 100_000, 400, "no valid JSON"),
        (b'{"prompt": "\xff"}', 400, "no valid JSON"),
        (b"[]", 400, "no JSON object"),
        (b'{"prompt": "' + b"x" * 2**20 + b'"}', 413, "more than 1048576 bytes"),
    ],
)
async def test_a_body_that_is_no_request_is_refused(
    content: bytes, status: int, words: str
) -> None:
    async with served_gateway(max_body_mib=1) as gateway, http(gateway) as client:
        headers = {"content-type": "application/json"}
        answer = await client.post(COMPLETIONS, content=content, headers=headers)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert words in error["message"]
        assert error["type"] == "invalid_request_error"
        assert not gateway.orchestrator.requests
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 200


async def test_other_content_types_paths_and_methods_are_refused_in_words() -> None:
    async with served_gateway() as gateway, http(gateway) as client:
        answers = [
            await client.post(COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"}),
            await client.post("/v1/nothing", json=BODY),
            await client.get(COMPLETIONS),
        ]
        assert [one.status_code for one in answers] == [415, 404, 405]
        for one in answers:
            assert set(one.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_message_that_grpc_cannot_carry_is_refused() -> None:
    async with served_gateway() as gateway, http(gateway) as client:
        answer = await client.post(COMPLETIONS, json={**BODY, "prompt": "x" * (5 * 2**20)})
        assert answer.status_code == 413
        assert not gateway.orchestrator.requests


async def test_answers_name_the_request() -> None:
    async with served_gateway() as gateway, http(gateway) as client:
        named = await client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "my-1"})
        assert named.headers["x-request-id"] == "my-1"
        unnamed = await client.post(COMPLETIONS, json={}, headers={"x-request-id": "two words"})
        assert unnamed.status_code == 400
        assert len(unnamed.headers["x-request-id"]) == 32


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_generation_at_once(stream: bool) -> None:
    orchestrator = ScriptedOrchestrator(hangs=True)
    async with served_gateway(orchestrator) as gateway:
        async with http(gateway) as client:
            with contextlib.suppress(httpx.ReadTimeout):
                async with client.stream(
                    "POST", COMPLETIONS, json={**BODY, "stream": stream}, timeout=0.2
                ) as answer:
                    lines = answer.aiter_lines()
                    await anext(lines)
            await becomes_true(lambda: orchestrator.requests)
        left = time.monotonic()
        await asyncio.wait_for(orchestrator.has_ended.wait(), 5)
        assert time.monotonic() - left < 0.5
        await gateway.admission.wait_until_empty()


async def test_a_client_that_leaves_ends_the_calls_of_all_its_prompts() -> None:
    orchestrator = ScriptedOrchestrator(hangs=True)
    async with served_gateway(orchestrator) as gateway:
        async with http(gateway) as client:
            body = {**BODY, "prompt": ["a", "b", "c"], "stream": True}
            async with client.stream("POST", COMPLETIONS, json=body) as answer:
                lines = answer.aiter_lines()  # its end would close the connection
                await anext(lines)
                await becomes_true(lambda: orchestrator.num_open == 3)
        await becomes_true(lambda: orchestrator.num_open == 0, 0.5)


async def test_a_client_that_does_not_read_is_given_up() -> None:
    many = said(*["x" * 10_000] * 2_000)
    async with served_gateway(
        ScriptedOrchestrator(many), client_write_timeout_seconds=0.2
    ) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        body = b'{"prompt": "Hi", "stream": true}'
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
            await becomes_true(lambda: gateway.orchestrator.requests)
            await becomes_true(lambda: gateway.admission.num_open == 0)
            await becomes_true(lambda: gateway.orchestrator.num_open == 0)
        async with http(gateway) as client:
            metrics = (await client.get("/metrics")).text
        assert 'requests_total{endpoint="completions",status="499"} 1.0' in metrics


async def test_the_first_event_does_not_wait_for_an_acknowledgement() -> None:
    def seconds_after_the_status(url: str) -> float:
        with contextlib.closing(HTTPConnection(url.removeprefix("http://"))) as connection:
            body = json.dumps({**BODY, "stream": True})
            connection.request("POST", COMPLETIONS, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            started = time.monotonic()
            assert answer.readline().startswith(b"data: ")
            return time.monotonic() - started

    async with served_gateway() as gateway:
        seconds = [await asyncio.to_thread(seconds_after_the_status, gateway.url) for _ in range(8)]
    assert min(seconds) < 0.03  # the client acknowledges after 0.04 s


async def test_more_requests_than_the_limit_are_refused() -> None:
    async with (
        served_gateway(ScriptedOrchestrator(hangs=True), max_requests=1) as gateway,
        http(gateway) as client,
        client.stream("POST", COMPLETIONS, json={**BODY, "stream": True}) as first,
    ):
        lines = first.aiter_lines()
        await anext(lines)
        refused = await client.post(COMPLETIONS, json=BODY)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "1"


async def test_an_ending_gateway_refuses_requests_and_finishes_open_ones() -> None:
    async with served_gateway(ScriptedOrchestrator(hangs=True)) as gateway, http(gateway) as client:
        body = {**BODY, "stream": True}
        async with client.stream("POST", COMPLETIONS, json=body) as open_one:
            lines = open_one.aiter_lines()
            await anext(lines)
            gateway.admission.refuse("the gateway is ending")
            refused = await client.post(COMPLETIONS, json=BODY)
            assert refused.status_code == 503
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/live")).status_code == 200
            gateway.admission.cut_off("cut off")
            rest = [line async for line in lines if line]
        assert '"message":"cut off"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        await gateway.admission.wait_until_empty()


async def test_a_generation_that_takes_too_long_is_a_timeout() -> None:
    orchestrator = ScriptedOrchestrator(lambda request: (), hangs=True)
    async with (
        served_gateway(orchestrator, request_timeout_seconds=0.2) as gateway,
        http(gateway) as client,
    ):
        answer = await client.post(COMPLETIONS, json=BODY)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"


async def test_without_an_orchestrator_requests_are_unavailable() -> None:
    async with served_gateway(orchestrator_is_away=True) as gateway, http(gateway) as client:
        for answer in (
            await client.post(COMPLETIONS, json=BODY),
            await client.get("/v1/models"),
            await client.get("/health"),
        ):
            assert answer.status_code == 503
            assert answer.json()["error"]["type"] == "server_error"
        assert (await client.get("/live")).status_code == 200


async def test_a_fault_of_the_gateway_is_an_internal_error_that_harms_no_other_request() -> None:
    def broken(request: Any) -> Any:
        if request.text == "broken":
            return [chunk("x", index=9), completion(9)]
        return [chunk("x"), completion()]

    async with served_gateway(ScriptedOrchestrator(broken)) as gateway, http(gateway) as client:
        answer = await client.post(COMPLETIONS, json={"prompt": "broken"})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "unexpected error: see the gateway's log"
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 200
        await gateway.admission.wait_until_empty()


async def test_names_of_the_model_are_the_operator_s() -> None:
    async with served_gateway(served_model_name="gpt-x, alias") as gateway, http(gateway) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [one["id"] for one in listed] == ["gpt-x", "alias"]
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 404
        for model, told in (("alias", "alias"), ("gpt-x", "gpt-x"), (None, "gpt-x")):
            answer = await client.post(COMPLETIONS, json={**BODY, "model": model})
            assert answer.json()["model"] == told


async def test_metrics_count_requests_by_status() -> None:
    async with served_gateway() as gateway, http(gateway) as client:
        await client.post(COMPLETIONS, json=BODY)
        await client.post(COMPLETIONS, json={**BODY, "n": 99})
        text = (await client.get("/metrics")).text
        for status in (200, 400):
            sample = f'requests_total{{endpoint="completions",status="{status}"}} 1.0'
            assert f"amusd_gateway_{sample}" in text
        assert "amusd_gateway_requests_running 0.0" in text
        first = 'amusd_gateway_time_to_first_token_seconds_count{endpoint="completions"} 1.0'
        assert first in text
