"""The embedded pair through the real services against ``generate()`` of Transformers."""

import pytest
import torch

from amusd.cli.baseline import TransformersRunner, transformers_runners
from amusd.cli.local_services import Placement
from amusd.client import Client, Options
from amusd.prompts import HUMAN_EVAL, Prompt, encode, load_prompts
from amusd.protocol.finish import FinishReason
from amusd.protocol.strategy import Strategy

pytestmark = [pytest.mark.pair, pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(900)]

QUESTIONS = (
    "Why do leaves change their colour in autumn?",
    "Write a short poem about a lighthouse.",
    "Explain to a child how a rainbow comes about.",
    "Give me a recipe for pancakes with four ingredients.",
    "What is the difference between a list and a tuple in Python?",
    "Translate 'good morning, how are you?' into French, German and Spanish.",
    "Who wrote 'Pride and Prejudice', and what is it about?",
    "A train leaves at 14:05 and arrives at 16:50. How long does it take?",
    "Write a SQL query that counts the orders of each customer.",
    "Summarise the water cycle in three sentences.",
)


@pytest.fixture(scope="module")
def oracle() -> TransformersRunner:
    runner = next(iter(transformers_runners("", "smollm2", Placement())))
    assert isinstance(runner, TransformersRunner)
    return runner


def twenty_prompts() -> list[Prompt]:
    code = load_prompts(HUMAN_EVAL, 164)[::17][:10]
    return [*code, *(Prompt.chat(question) for question in QUESTIONS)]


@pytest.mark.parametrize("index", [0, 12])
def test_every_strategy_writes_what_transformers_generates(
    client: Client, oracle: TransformersRunner, index: int
) -> None:
    prompt = twenty_prompts()[index]
    expected = oracle.run(prompt, 128).tokens
    for strategy in Strategy:
        generation = client.generate(prompt, Options(strategy, 128)).wait()
        assert tuple(generation.tokens) == expected
        assert generation.text == oracle.tokenizer.decode(expected, skip_special_tokens=True)
        assert generation.summary().num_output_tokens == len(expected)
        assert not generation.summary().fallback_reason


def test_every_token_of_amusd_is_the_likeliest_of_transformers_for_twenty_prompts(
    client: Client, oracle: TransformersRunner
) -> None:
    """One pass over prompt and output says what greedy decoding writes, in less time."""
    prompts = twenty_prompts()
    assert len(prompts) == 20
    end_of_text = client.server_info().verify_model.eos_token_ids
    for prompt in prompts:
        tokens = list(client.generate(prompt, Options(Strategy.AMUSD, 32)).wait().tokens)
        assert len(tokens) == 32 or tokens[-1] in end_of_text
        prompt_ids = encode(prompt, oracle.tokenizer)
        with torch.inference_mode():
            logits = oracle.model(torch.tensor([prompt_ids + tokens])).logits[0]
        assert logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist() == tokens


def test_an_output_ends_with_the_models_end_of_text_token(
    client: Client, oracle: TransformersRunner
) -> None:
    prompt = Prompt.chat("Answer with one word: what is the capital of France?")
    generation = client.generate(prompt, Options(Strategy.AMUSD, 100)).wait()
    assert generation.finish_reason is FinishReason.STOP
    assert generation.tokens[-1] in client.server_info().verify_model.eos_token_ids
    assert tuple(generation.tokens) == oracle.run(prompt, 100).tokens
