"""Generations through the three services: tokens, text and statistics."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.finish import FinishReason
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.process.services import VERIFY_MODEL, Trio
from tests.process.synthetic_models import expected_output

pytestmark = pytest.mark.process


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("lookahead", [1, 2, 5, 8])
def test_every_strategy_writes_the_verify_models_own_tokens(
    client: Client, strategy: Strategy, lookahead: int
) -> None:
    prompt = (3, 1, 4, 1, 5)
    generation = client.generate(Prompt(tokens=prompt), Options(strategy, 60, lookahead)).wait()
    assert generation.tokens == expected_output(VERIFY_MODEL, prompt, 60)
    assert generation.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("strategy", list(Strategy))
def test_the_statistics_add_up(client: Client, strategy: Strategy) -> None:
    generation = client.generate(Prompt(tokens=(7,)), Options(strategy, 80)).wait()
    found = generation.summary()
    assert found.num_prompt_tokens == 1
    assert found.num_output_tokens == 80
    assert found.num_drafted == found.num_accepted + found.num_rejected + found.num_wasted
    assert found.num_rollbacks == found.num_rejected
    assert found.num_passes <= 80
    assert found.verify_busy_seconds >= found.num_passes * 0.004
    assert found.verify_busy_seconds <= found.wall_seconds
    assert 0 < found.time_to_first_token_seconds < found.wall_seconds
    places = found.acceptance_per_position
    assert sum(place.num_accepted for place in places) <= found.num_accepted
    if strategy is Strategy.AUTOREGRESSIVE:
        assert found.num_passes == 80
        assert found.num_drafted == 0
        assert found.draft_busy_seconds == 0
    else:
        assert found.num_passes < 80
        assert found.acceptance_rate == pytest.approx(0.7, abs=0.2)
        assert found.draft_busy_seconds > 0


def test_the_text_is_that_of_the_bytes_of_all_tokens(client: Client) -> None:
    pieces = list(generation := client.generate(Prompt(text="naïve"), Options(max_tokens=100)))
    expected = expected_output(VERIFY_MODEL, tuple("naïve".encode()), 100)
    assert generation.tokens == expected
    raw = bytes(token for token in expected if token < 256)
    assert "".join(pieces) == generation.text == raw.decode(errors="replace")


def test_a_stop_token_ends_the_output_and_is_part_of_it(client: Client) -> None:
    prompt = (9, 9)
    expected = expected_output(VERIFY_MODEL, prompt, 50)
    stop = expected[20]
    options = Options(Strategy.AMUSD, 50, stop_token_ids=(stop,))
    generation = client.generate(Prompt(tokens=prompt), options).wait()
    assert generation.finish_reason is FinishReason.STOP
    assert generation.tokens == expected[: expected.index(stop) + 1]


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("includes_stop", [False, True])
def test_a_stop_text_ends_the_output_of_every_strategy_alike(
    trio: Trio, strategy: Strategy, includes_stop: bool
) -> None:
    prompt = (9, 9)
    expected = expected_output(VERIFY_MODEL, prompt, 50)
    whole = text_of(expected)
    pairs = (whole[start : start + 2] for start in range(5, len(whole) - 1))
    stop = next(pair for pair in pairs if pair.isascii())
    request = orchestrator_pb2.GenerateRequest(
        strategy=codec.strategy_to_proto(strategy),
        max_tokens=50,
        stop=[stop],
        include_stop=includes_stop,
    )
    request.tokens.ids.extend(prompt)
    (tokens,), (text,), (end,) = outputs(trio, request)
    cut = whole.index(stop)
    assert text == whole[: cut + 2 if includes_stop else cut]
    assert tokens == expected[: len(tokens)]
    assert text_of(tokens) == whole[: cut + 2]
    assert end.stop_text == stop
    assert end.finish_reason == orchestrator_pb2.FINISH_REASON_STOP
    found = end.statistics
    assert found.num_output_tokens == len(tokens)
    assert found.num_accepted + found.num_rejected <= found.num_output_tokens
    assert found.num_drafted == found.num_accepted + found.num_rejected + found.num_wasted


def test_several_completions_share_the_prefill(trio: Trio) -> None:
    prompt = tuple(range(100, 160))
    request = orchestrator_pb2.GenerateRequest(max_tokens=20, num_completions=4)
    request.tokens.ids.extend(prompt)
    tokens, _, ends = outputs(trio, request)
    assert tokens == [expected_output(VERIFY_MODEL, prompt, 20)] * 4
    cached = [end.statistics.num_cached_prompt_tokens for end in ends]
    assert cached[1:] == [len(prompt) - 1] * 3


def text_of(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def outputs(
    trio: Trio, request: orchestrator_pb2.GenerateRequest
) -> tuple[list[list[int]], list[str], list[orchestrator_pb2.Completion]]:
    """Return the tokens, text and end of each completion of a request."""
    number = max(1, request.num_completions)
    tokens: list[list[int]] = [[] for _ in range(number)]
    texts = [""] * number
    ends = [orchestrator_pb2.Completion()] * number
    with trio.orchestrator.channel() as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        for response in stub.Generate(request, timeout=60):
            if response.HasField("chunk"):
                tokens[response.chunk.index] += response.chunk.token_ids
                texts[response.chunk.index] += response.chunk.text
            else:
                texts[response.completion.index] += response.completion.text
                ends[response.completion.index] = response.completion
    return tokens, texts, ends


def test_an_output_may_fill_the_context_to_its_last_token(client: Client) -> None:
    prompt = tuple(range(570))
    prompt = tuple(token % 512 for token in prompt)
    for strategy in Strategy:
        generation = client.generate(Prompt(tokens=prompt), Options(strategy, 30)).wait()
        assert generation.tokens == expected_output(VERIFY_MODEL, prompt, 30)


def test_twenty_generations_at_once_do_not_disturb_one_another(trio: Trio) -> None:
    def generate(number: int) -> bool:
        prompt = tuple(range(1, 2 + number))
        strategy = list(Strategy)[number % 3]
        with Client(trio.orchestrator.address, timeout_seconds=120) as client:
            options = Options(strategy, 10 + number, 1 + number % 8)
            generation = client.generate(Prompt(tokens=prompt), options).wait()
        assert not generation.summary().fallback_reason
        return generation.tokens == expected_output(VERIFY_MODEL, prompt, 10 + number)

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(generate, range(20)))


def test_the_server_info_has_models_limits_and_strategies(client: Client) -> None:
    info = client.server_info()
    assert info.verify_model.name == VERIFY_MODEL
    assert info.draft_model.vocabulary.fingerprint == info.verify_model.vocabulary.fingerprint
    assert info.limits.max_context == 600
    assert info.limits.max_lookahead == 16
    assert len(info.strategies) == 3
