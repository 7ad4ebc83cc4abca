"""A gateway process before real services."""

import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from tests.process.services import Service, Starter, Trio, becomes_true

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def gateway(start_for_all: Starter, trio: Trio) -> Service:
    service = start_for_all("gateway", "--orchestrator", trio.orchestrator.address)
    assert becomes_true(lambda: httpx.get(f"http://{service.address}/health").status_code == 200)
    return service


@pytest.fixture
def api(gateway: Service) -> Iterator[openai.OpenAI]:
    base_url = f"http://{gateway.address}/v1"
    with openai.OpenAI(base_url=base_url, api_key="-", max_retries=0) as made:
        yield made


@pytest.fixture
def model(api: openai.OpenAI) -> str:
    return api.models.list().data[0].id


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative", "amusd"])
def test_a_completion_is_that_of_the_contract(
    api: openai.OpenAI, model: str, client: Client, strategy: str
) -> None:
    extra = {"strategy": strategy, "return_token_ids": True}
    expected = client.generate(Prompt(text="Hello"), Options(max_tokens=40)).wait()
    asked: dict[str, Any] = {
        "model": model, "prompt": "Hello", "max_tokens": 40, "temperature": 0, "extra_body": extra
    }  # fmt: skip
    answer = api.completions.create(**asked)
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == expected.tokens
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40

    chunks = list(api.completions.create(**asked, stream=True))
    assert "".join(one.choices[0].text for one in chunks) == expected.text
    tokens = [
        token for one in chunks for token in (one.choices[0].model_extra or {}).get("token_ids", ())
    ]
    assert tokens == expected.tokens
    metrics = [(one.model_extra or {}).get("metrics") for one in (answer, chunks[-1])]
    if strategy == "autoregressive":
        assert metrics == [None, None]
        return
    for one in metrics:
        assert one is not None
        figures = one["speculative_decoding"]
        histogram = figures["acceptance_histogram"]
        assert sum(histogram) == figures["num_spec_steps"] > 0
        accepted = sum(number * steps for number, steps in enumerate(histogram))
        assert accepted == figures["num_accepted_draft_tokens"] <= figures["num_draft_tokens"]
        assert figures["mean_acceptance_length"] == 1 + accepted / figures["num_spec_steps"]


def test_what_the_orchestrator_refuses_names_the_field(api: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.completions.create(model=model, prompt="Hi", max_tokens=0, temperature=0)
    assert refused.value.param == "max_tokens"
    assert "ask for 1 or more" in refused.value.message


def test_a_client_that_leaves_ends_the_session_in_all_services(
    gateway: Service, trio: Trio, api: openai.OpenAI, model: str
) -> None:
    stream = api.completions.create(
        model=model, prompt="Hi", max_tokens=500, temperature=0, stream=True,
        extra_body={"strategy": "autoregressive"},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    left = time.monotonic()
    with Client(trio.orchestrator.address) as client:

        def num_open() -> int:
            replicas = client.server_info().verify_replicas
            return sum(one.num_own_sessions for one in replicas)

        assert becomes_true(lambda: num_open() == 0)
    assert time.monotonic() - left < 0.5


def test_a_signal_lets_an_open_answer_end(start: Starter, trio: Trio) -> None:
    service = start("gateway", "--orchestrator", trio.orchestrator.address)
    url = f"http://{service.address}"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as api:
        model = api.models.list().data[0].id
        expected = api.completions.create(model=model, prompt="Hi", max_tokens=60, temperature=0)
        stream = iter(
            api.completions.create(
                model=model, prompt="Hi", max_tokens=60, temperature=0, stream=True
            )
        )
        text = next(stream).choices[0].text
        service.process.send_signal(signal.SIGTERM)
        text += "".join(one.choices[0].text for one in stream)
    assert text == expected.choices[0].text
    assert service.process.wait(10) == 0
    with socket.socket() as probe:
        host, port = service.address.rsplit(":", 1)
        assert probe.connect_ex((host, int(port))) != 0
