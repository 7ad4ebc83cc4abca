"""Tiny models through real services against Transformers.

One has the native runner and one PyTorch's; the tests of the runners have more families.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.strategy import Strategy
from tests.process.services import Starter, start_trio
from tests.tiny import VOCABULARY, build, perturbed, save

pytestmark = [pytest.mark.process, pytest.mark.slow]


def generate(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
    return [int(token) for token in output[0, len(prompt) :]]


@pytest.fixture(params=["llama", "gpt2"])
def served(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    start: Starter,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[PreTrainedModel, Client]]:
    # Threads that wait for one another in three processes are slow on few cores.
    monkeypatch.setenv("AMUSD_THREADS", "1")
    model = build(request.param)
    model.train(False)
    verify = save(model, tmp_path / "verify")
    draft = save(perturbed(model, 0.05), tmp_path / "draft")
    trio = start_trio(start, verify, draft)
    with Client(trio.orchestrator.address, timeout_seconds=60) as client:
        yield model, client


def test_every_strategy_writes_what_transformers_generates(
    served: tuple[PreTrainedModel, Client],
) -> None:
    model, client = served
    num_accepted = 0
    for length in (1, 20, 300):  # the last one is computed in chunks
        prompt = [(7 * index + length) % VOCABULARY for index in range(length)]
        expected = generate(model, prompt, 48)
        for strategy in Strategy:
            options = Options(strategy, 48, ignore_eos=True)
            generation = client.generate(Prompt(tokens=tuple(prompt)), options).wait()
            assert generation.tokens == expected
            assert not generation.summary().fallback_reason
            num_accepted += generation.summary().num_accepted
    assert num_accepted > 0
