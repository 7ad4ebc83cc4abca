"""Sampled output through real services: the same tokens however they are decoded, by the right law.

Two models write nearly constant distributions, so that frequencies can be compared with them.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from amusd.engine.sampling.reference_sampler import kept_scores
from amusd.sampling.parameters import SamplingParameters
from amusd.v1 import orchestrator_pb2 as pb
from amusd.v1 import orchestrator_pb2_grpc as rpc
from amusd.v1 import sampling_pb2
from tests.process.services import Service, Trio, start_service, start_trio
from tests.tiny import COMMON, NO_SPECIAL, VOCABULARY, build, perturbed, save

pytestmark = [pytest.mark.process, pytest.mark.slow]

AUTOREGRESSIVE = pb.STRATEGY_AUTOREGRESSIVE
STRATEGIES = (AUTOREGRESSIVE, pb.STRATEGY_SPECULATIVE, pb.STRATEGY_AMUSD)
NUM_REQUESTS = 100  # each decoded in 5 ways
CONCURRENCY = 16


@dataclass(frozen=True)
class Output:
    """What came of one completion."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: int
    statistics: Any


class Server:
    """A running orchestrator."""

    def __init__(self, trio: Trio) -> None:
        self._channel = grpc.insecure_channel(trio.orchestrator.address)
        self._stub = rpc.OrchestratorServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def outputs(self, request: pb.GenerateRequest) -> list[Output]:
        """Return the completions of a request, by index."""
        tokens: dict[int, list[int]] = {}
        texts: dict[int, str] = {}
        ends: dict[int, pb.Completion] = {}
        for response in self._stub.Generate(request, timeout=60):
            part = response.chunk if response.HasField("chunk") else response.completion
            texts[part.index] = texts.get(part.index, "") + part.text
            if response.HasField("chunk"):
                tokens.setdefault(part.index, []).extend(response.chunk.token_ids)
            else:
                ends[part.index] = response.completion
        return [
            Output(tuple(tokens[index]), texts[index], end.finish_reason, end.statistics)
            for index, end in sorted(ends.items())
        ]

    def one(self, request: pb.GenerateRequest) -> Output:
        [output] = self.outputs(request)
        return output

    def all(self, requests: Sequence[pb.GenerateRequest]) -> list[Output]:
        """Return one output of each request; several requests run at the same time."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(self.one, requests))


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("services")
    running: list[Service] = []
    numbers = itertools.count()

    def start(role: str, *flags: str) -> Service:
        log = folder / f"{role}-{next(numbers)}.log"
        running.append(start_service(log, role, "--threads", "1", *flags)
                       if role != "orchestrator" else start_service(log, role, *flags))  # fmt: skip
        return running[-1]

    try:
        yield start
    finally:
        for service in reversed(running):
            service.end()


@pytest.fixture(scope="module")
def tiny(starter: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny")
    model = build("llama")
    draft = save(perturbed(model, 0.05), folder / "draft")
    server = Server(start_trio(starter, save(model, folder / "verify"), draft))
    yield server
    server.close()


@pytest.fixture(scope="module")
def constant(starter: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Constant"]:
    folder = tmp_path_factory.mktemp("constant")
    verify, draft = constant_model(0.0), constant_model(0.4)
    trio = start_trio(starter, save(verify, folder / "verify"), save(draft, folder / "draft"))
    server = Server(trio)
    yield Constant(server, logits_of(verify), logits_of(draft))
    server.close()


@dataclass(frozen=True)
class Constant:
    """Services whose models have the same logits in every context."""

    server: Server
    verify_logits: npt.NDArray[np.float32]
    draft_logits: npt.NDArray[np.float32]


def constant_model(noise: float) -> LlamaForCausalLM:
    """Return a model whose hidden state is the same for every context."""
    torch.manual_seed(5)
    config = LlamaConfig(**(COMMON | NO_SPECIAL | {"max_position_embeddings": 4096}))
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.randn(64)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head = 0.25 * torch.randn(VOCABULARY, 64)
        torch.manual_seed(6)
        model.lm_head.weight[:] = head + 0.25 * noise * torch.randn(VOCABULARY, 64)
    return model


@torch.inference_mode()
def logits_of(model: LlamaForCausalLM) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = model(torch.tensor([[1, 2, 3]])).logits[0, -1].numpy()
    return found


def random_request(number: int) -> pb.GenerateRequest:
    """Return a request with parameters by chance."""
    chance = random.Random(number)
    length = chance.choice((1, 7, 40, 130))
    request = pb.GenerateRequest(
        tokens=pb.TokenIds(ids=[chance.randrange(VOCABULARY) for _ in range(length)]),
        max_tokens=chance.randrange(1, 48),
        sampling=sampling_pb2.Sampling(
            temperature=chance.choice((0.0, 0.4, 1.0, 1.0, 2.5)), seed=chance.getrandbits(64)
        ),
    )
    sampling = request.sampling
    for name, values in {
        "top_k": (0, 1, 5, 60),
        "top_p": (1.0, 0.3, 0.9),
        "min_p": (0.0, 0.02, 0.3),
        "repetition_penalty": (1.0, 0.8, 1.3),
        "presence_penalty": (0.0, -1.0, 1.5),
        "frequency_penalty": (0.0, 0.7),
        "no_repeat_ngram_size": (0, 2, 3),
    }.items():
        if chance.random() < 0.4:
            setattr(sampling, name, chance.choice(values))
    if chance.random() < 0.3:
        for _ in range(5):
            sampling.logit_bias[chance.randrange(VOCABULARY)] = chance.uniform(-20, 8)
    if chance.random() < 0.2:
        sampling.allowed_token_ids.extend(chance.sample(range(VOCABULARY), 30))
    if chance.random() < 0.2:
        for size in (1, 2, 2):
            word = [chance.randrange(VOCABULARY) for _ in range(size)]
            sampling.bad_words.add(ids=word)
    if chance.random() < 0.3:
        request.stop_token_ids.extend(chance.sample(range(VOCABULARY), 8))
        request.min_tokens = chance.randrange(request.max_tokens + 1)
    if chance.random() < 0.3:
        request.stop.extend(chr(chance.randrange(97, 123)) for _ in range(2))
    return request


def with_strategy(request: pb.GenerateRequest, strategy: int) -> pb.GenerateRequest:
    copy = pb.GenerateRequest()
    copy.CopyFrom(request)
    copy.strategy = strategy  # type: ignore[assignment]
    return copy


def test_no_strategy_and_no_batch_changes_a_token(tiny: Server) -> None:
    requests = [random_request(number) for number in range(NUM_REQUESTS)]
    alone = [tiny.one(with_strategy(request, AUTOREGRESSIVE)) for request in requests]
    for strategy in STRATEGIES:
        found = tiny.all([with_strategy(request, strategy) for request in requests])
        for request, expected, output in zip(requests, alone, found, strict=True):
            assert (output.tokens, output.text) == (expected.tokens, expected.text), request
            assert output.finish_reason == expected.finish_reason
            assert output.statistics.num_output_tokens == len(output.tokens)
    again = [tiny.one(with_strategy(request, pb.STRATEGY_AMUSD)) for request in requests]
    assert [one.tokens for one in again] == [one.tokens for one in alone]
    assert len({one.tokens for one in alone}) > NUM_REQUESTS / 2
    assert sum(one.statistics.num_accepted for one in again) > 0


def test_completions_have_the_seeds_that_follow_one_another(tiny: Server) -> None:
    request = pb.GenerateRequest(
        tokens=pb.TokenIds(ids=range(40)),
        max_tokens=12,
        num_completions=3,
        sampling=sampling_pb2.Sampling(temperature=1.0, seed=2**64 - 2),
    )
    several = tiny.outputs(request)
    request.num_completions = 1
    for number, output in enumerate(several):
        request.sampling.seed = (2**64 - 2 + number) % 2**64
        assert tiny.one(request).tokens == output.tokens
    assert len({output.tokens for output in several}) == 3


SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 40},
    {"temperature": 1.4, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
)
NUM_SESSIONS, NUM_TOKENS = 16, 530  # of each setting with each strategy: 101,760 draws in all


def expected_of(logits: npt.NDArray[np.float32], setting: dict[str, Any]) -> npt.NDArray[Any]:
    scores = kept_scores(logits, SamplingParameters(**setting))
    shares = np.exp(scores - scores.max())
    return np.asarray(shares / shares.sum())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_have_the_frequencies_of_the_verify_model(
    constant: Constant, setting: dict[str, Any], strategy: int
) -> None:
    requests = [
        pb.GenerateRequest(
            tokens=pb.TokenIds(ids=[1, 2, 3]),
            max_tokens=NUM_TOKENS,
            strategy=strategy,  # type: ignore[arg-type]
            sampling=sampling_pb2.Sampling(**setting, seed=1000 * strategy + number),
        )
        for number in range(NUM_SESSIONS)
    ]
    outputs = constant.server.all(requests)
    tokens = np.concatenate([output.tokens for output in outputs])
    counts = np.bincount(tokens, minlength=VOCABULARY)
    expected = len(tokens) * expected_of(constant.verify_logits, setting)
    assert len(tokens) == NUM_SESSIONS * NUM_TOKENS
    assert not counts[expected == 0].any()
    assert chi_square_is_plausible(counts, expected)
    if strategy == pb.STRATEGY_SPECULATIVE:
        accepted = sum(one.statistics.num_accepted for one in outputs)
        compared = accepted + sum(one.statistics.num_rejected for one in outputs)
        p = expected / len(tokens)
        q = expected_of(constant.draft_logits, setting)
        distance = 0.5 * float(np.abs(p - q).sum())
        bound = (1 - distance) / (1 + distance)
        spread = math.sqrt(bound * (1 - bound) / compared)
        assert accepted / compared > bound - 4 * spread


def chi_square_is_plausible(counts: npt.NDArray[Any], expected: npt.NDArray[Any]) -> bool:
    """Whether Pearson's statistic is below its 99.99 % quantile, by Wilson and Hilferty."""
    is_rare = expected < 5
    groups = [*zip(counts[~is_rare], expected[~is_rare], strict=True)]
    if expected[is_rare].sum() >= 5:
        groups.append((counts[is_rare].sum(), expected[is_rare].sum()))
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in groups)
    freedom = len(groups) - 1
    part = 2 / (9 * freedom)
    quantile = freedom * (1 - part + 3.719 * math.sqrt(part)) ** 3
    return bool(statistic < quantile)


def test_a_wrong_law_is_found() -> None:
    chance = np.random.default_rng(1)
    law = np.exp(chance.normal(size=64))
    law /= law.sum()
    other = law**0.9 / (law**0.9).sum()
    counts = np.bincount(chance.choice(64, size=8480, p=other), minlength=64)
    assert chi_square_is_plausible(counts, 8480 * other)
    assert not chi_square_is_plausible(counts, 8480 * law)


def test_the_constant_model_is_constant() -> None:
    model = constant_model(0.0)
    with torch.inference_mode():
        rows = model(torch.tensor([[9, 200, 3, 77]])).logits[0]
    assert torch.allclose(rows, rows[:1].expand_as(rows), atol=1e-4)
