"""Prompts of the training text: user turns that the verify model writes, and given prompts."""

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

from amusd.distill.writer import TextWriter
from amusd.prompts import Prompt, encode

_TURN_TOKENS = 48  # maximum length of a user turn that the verify model writes
_TURN_TEMPERATURE = 0.9
_MARKER = "\0"

# A synthetic user turn starts with one of these, often with the empty string. The model continues.
_OPENERS = (
    *[""] * 12,
    *("What", "How", "Why", "Who", "Where", "When", "Which", "Is it", "Can you", "Could you"),
    *("Explain", "Describe", "Compare", "Summarize", "Translate", "Solve", "List", "Suggest"),
    *("Write", "Write a", "Write an email", "Write a story", "Write a Python function", "Create"),
    *("Give me", "Tell me", "Help me", "I need", "I have", "Imagine", "You are", "If", "Rewrite"),
)


class PromptSource:
    """Batches of prompts; the content of a batch depends only on its number and the seed."""

    def __init__(
        self, tokenizer: Any, given: Sequence[Prompt], made_up_share: float, prompt_tokens: int
    ) -> None:
        """Mix ``given`` prompts with prompts that the verify model writes.

        Args:
            tokenizer: the verify model's.
            given: prompts of the user; if empty, the verify model writes all prompts.
            made_up_share: share of the batches that the verify model writes, 0 to 1.
            prompt_tokens: maximum length; longer prompts are truncated at the start.
        """
        self._tokenizer = tokenizer
        self._given = given
        self._made_up_share = made_up_share if given else 1.0
        self._limit = prompt_tokens

    def batch(self, number: int, rows: int, seed: int, writer: TextWriter) -> list[list[int]]:
        """Return the prompts of batch ``number``."""
        rng = random.Random(f"{seed}-{number}")
        # Batches of both kinds are spread evenly over the batch numbers.
        made_up_before = int(number * self._made_up_share)
        if int((number + 1) * self._made_up_share) > made_up_before:
            return self._made_up(rows, rng, writer)
        return self._from_given(number - made_up_before, rows, seed)

    def _from_given(self, number: int, rows: int, seed: int) -> list[list[int]]:
        """Take the given prompts in order; each round through them is shuffled anew."""
        first = number * rows
        chosen: list[Prompt] = []
        while len(chosen) < rows:
            round_number, offset = divmod(first + len(chosen), len(self._given))
            order = list(range(len(self._given)))
            random.Random(f"{seed}-{round_number}").shuffle(order)
            chosen += [self._given[i] for i in islice(order, offset, offset + rows - len(chosen))]
        return [encode(prompt, self._tokenizer)[-self._limit :] for prompt in chosen]

    def _made_up(self, rows: int, rng: random.Random, writer: TextWriter) -> list[list[int]]:
        before, after = self._frame()
        starts = [before + rng.choice(_OPENERS) for _ in range(rows)]
        heads = [self._ids(start) or self._any_start(rng) for start in starts]
        if (
            not after
        ):  # no chat template: the prompt is the start of a text, the answer continues it
            limit = _TURN_TOKENS // 2
            begun = writer.write(heads, [_TURN_TEMPERATURE] * rows, limit, rng.getrandbits(62))
            return [row.prompt + row.tokens for row in begun]
        end = self._ids(after)
        begun = writer.write(heads, [_TURN_TEMPERATURE] * rows, _TURN_TOKENS, rng.getrandbits(62))
        return [row.prompt + _until(row.tokens, end[0]) + end for row in begun]

    def _frame(self) -> tuple[str, str]:
        """Return the text of the chat template before and after a user turn."""
        if not getattr(self._tokenizer, "chat_template", None):
            return "", ""
        messages = [{"role": "user", "content": _MARKER}]
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        before, _, after = str(text).partition(_MARKER)
        return before, after

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _any_start(self, rng: random.Random) -> list[int]:
        start = self._tokenizer.bos_token_id
        return [rng.randrange(len(self._tokenizer)) if start is None else int(start)]


def _until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens
