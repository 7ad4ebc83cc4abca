"""Prompt files: every accepted form, and errors that name the line."""

from pathlib import Path

import pytest

from amusd.prompts import Prompt, load_prompts
from amusd.protocol.errors import InvalidInputError


def written(folder: Path, *lines: str) -> str:
    """Write a prompt file and return its path."""
    path = folder / "prompts.jsonl"
    path.write_bytes("\n".join(lines).encode())
    return str(path)


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ('{"prompt": "def f():"}', Prompt(text="def f():")),
        ('{"turns": ["first", "second"]}', Prompt.chat("first")),
        (
            '{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}',
            Prompt(messages=(("system", "a"), ("user", "b"))),
        ),
        ('{"prompt": "one\u2028two\u0085three"}', Prompt(text="one\u2028two\u0085three")),
        ('{"prompt": "carriage return follows"}\r', Prompt(text="carriage return follows")),
    ],
)
def test_a_line_is_a_prompt(tmp_path: Path, line: str, prompt: Prompt) -> None:
    assert load_prompts(written(tmp_path, line), 10) == [prompt]


def test_empty_lines_are_skipped_and_the_limit_holds(tmp_path: Path) -> None:
    lines = ["", *(f'{{"prompt": "{number}"}}' for number in range(5)), "  ", ""]
    source = written(tmp_path, *lines)
    assert [one.text for one in load_prompts(source, 3)] == ["0", "1", "2"]
    assert len(load_prompts(source, 10)) == 5


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "null", "7", '{"prompt": ""}', '{"prompt": 3}', '{"turns": []}',
     '{"turns": [""]}', '{"messages": []}', '{"messages": [{"role": "user", "content": ""}]}',
     '{"messages": ["hello"]}'],
)  # fmt: skip
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    source = written(tmp_path, '{"prompt": "fine"}', "", line)
    with pytest.raises(InvalidInputError) as caught:
        load_prompts(source, 1)
    assert f"{source}, line 3: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="has no prompts"):
        load_prompts(written(tmp_path, ""), 1)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InvalidInputError, match="not UTF-8"):
        load_prompts(str(path), 1)


@pytest.mark.parametrize("name", ["nothing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot read prompts"):
        load_prompts(str(tmp_path / name), 1)
