"""LongRoPE: any schedule gives each text the logits of the model alone, beyond the switch, too."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from amusd.engine.kv.sequence_cache import SequenceCache
from amusd.engine.runners.ragged import RaggedRunner
from amusd.engine.runners.rope_switching import RopeSwitchingRunner, SwitchingBuffer
from amusd.engine.runners.runner import Chunk, ModelRunner
from amusd.engine.runners.self_check import relative_error
from amusd.engine.runners.unbatched import UnbatchedRunner
from tests import tiny

SWITCH = 20
LENGTH = 32
TEXTS = [[(i * 37 + i * i * 5 + 90 * t) % 256 for i in range(LENGTH)] for t in range(3)]

Runner = RopeSwitchingRunner[Any]


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    torch.manual_seed(3)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
        "original_max_position_embeddings": SWITCH,
    }
    config = Phi3Config(
        **tiny.COMMON | tiny.NO_SPECIAL,
        original_max_position_embeddings=SWITCH,
        rope_parameters=rope,
        sliding_window=None,
    )
    return Phi3ForCausalLM(config)


@pytest.fixture(scope="module")
def expected(model: Phi3ForCausalLM) -> list[Tensor]:
    """The logits after each token of each text, from the tokens up to it, [tokens, head]."""
    with torch.inference_mode():
        return [
            torch.cat(
                [
                    model(torch.tensor([text[:end]]), use_cache=False).logits[0, -1:]
                    for end in range(1, LENGTH + 1)
                ]
            )
            for text in TEXTS
        ]


@pytest.fixture(params=[RaggedRunner, UnbatchedRunner])
def runner(request: pytest.FixtureRequest, model: Phi3ForCausalLM) -> Runner:
    return RopeSwitchingRunner(request.param(model), SWITCH)


def assert_alone(runner: Runner, batch: Sequence[Chunk[Any]], expected: Sequence[Tensor]) -> None:
    """Run a batch of chunks of texts, in this order; compare all outputs."""
    rows = [
        own[chunk.start + len(chunk.tokens) - chunk.num_outputs : chunk.start + len(chunk.tokens)]
        for chunk, own in zip(batch, expected, strict=True)
    ]
    assert relative_error(runner.logits(batch), torch.cat(rows)) < 1e-4


def test_any_chunks_and_rollbacks_give_the_logits_of_the_model_alone(
    runner: Runner, expected: list[Tensor]
) -> None:
    rng = random.Random(7)
    buffers = [runner.allocate(LENGTH) for _ in TEXTS]
    held = [0] * len(TEXTS)
    for _ in range(40):
        batch: list[Chunk[Any]] = []
        rows: list[Tensor] = []
        for index in rng.sample(range(len(TEXTS)), rng.randint(1, len(TEXTS))):
            start = max(0, held[index] - rng.choice((0, 0, 1, 4, 20)))
            if start == LENGTH:
                start = rng.randrange(LENGTH)
            tokens = TEXTS[index][start : start + rng.choice((1, 3, 12))]
            held[index] = start + len(tokens)
            num_outputs = rng.randint(0 if batch else 1, len(tokens))
            batch.append(Chunk(buffers[index], start, tokens, num_outputs))
            rows.append(expected[index])
        assert_alone(runner, batch, rows)


@pytest.mark.parametrize("num_copied", [SWITCH - 5, SWITCH + 5])
@pytest.mark.parametrize("num_donated", [SWITCH - 3, LENGTH])
def test_a_copied_prefix_has_the_factors_of_the_text_that_continues_it(
    runner: Runner, expected: list[Tensor], num_donated: int, num_copied: int
) -> None:
    num_copied = min(num_copied, num_donated)
    donor, target = runner.allocate(LENGTH), runner.allocate(LENGTH)
    runner.logits([Chunk(donor, 0, TEXTS[0][:num_donated], 1)])
    runner.copy(donor, target, num_copied)
    for end in (num_copied + 1, LENGTH):
        chunk = Chunk(target, num_copied, TEXTS[0][num_copied:end], end - num_copied)
        assert_alone(runner, [chunk], expected[:1])
    assert_alone(runner, [Chunk(donor, 10, TEXTS[0][10:], LENGTH - 10)], expected[:1])


class Failing:
    """A runner that computes a pass and then fails, once."""

    name = "failing"

    def __init__(self, runner: ModelRunner[SequenceCache]) -> None:
        self._runner = runner
        self.fails = False
        self.allocate, self.copy, self.free = runner.allocate, runner.copy, runner.free
        self.tokens, self.rankings = runner.tokens, runner.rankings
        self.sample = runner.sample

    def logits(self, batch: Sequence[Chunk[SequenceCache]]) -> Tensor:
        logits = self._runner.logits(batch)
        if self.fails:
            self.fails = False
            raise RuntimeError("out of memory")
        return logits


def test_after_a_pass_that_failed_the_text_is_computed_again(
    model: Phi3ForCausalLM, expected: list[Tensor]
) -> None:
    failing = Failing(RaggedRunner(model))
    runner = RopeSwitchingRunner(failing, SWITCH)
    buffer: SwitchingBuffer[SequenceCache] = runner.allocate(LENGTH)
    runner.logits([Chunk(buffer, 0, TEXTS[0][:SWITCH], 1)])
    chunk = Chunk(buffer, SWITCH, TEXTS[0][SWITCH : SWITCH + 2], 2)
    failing.fails = True
    with pytest.raises(RuntimeError):
        runner.logits([chunk])
    assert_alone(runner, [Chunk(buffer, SWITCH - 2, TEXTS[0][SWITCH - 2 :], 4)], expected[:1])
