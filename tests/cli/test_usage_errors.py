"""A wrong command line of any command is one line that says what to do, and exit code 2."""

import sys

import pytest

from amusd.cli.app import app
from amusd.cli.server_choice import errors
from amusd.cli.usage_errors import run_app

ADDRESS = (
    "error: --address (AMUSD_ADDRESS): 'localhost' has no port: write host:port, such as "
    "localhost:50050, 10.0.0.7:50050 or [::1]:50050; see amusd {command} --help"
)


def outcome(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["amusd", *words])
    # Otherwise click would name the command "python -m pytest" if that runs the tests.
    monkeypatch.setattr(sys.modules["__main__"], "__package__", "")
    code = run_app(app)
    seen = capsys.readouterr()
    return code, seen.err + seen.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("bench",), "error: Missing option '--prompts'; see amusd bench --help"),
        (("bench", "--prompts", "x", "--limit", "0"), "error: --limit: "),
        (("compare",), "error: Missing argument 'prompt'"),
        (("compare", "x", "--max-tokens", "many"), "error: --max-tokens: "),
        (("generate", "x", "--strategy", "magic"), "error: --strategy: 'magic' is not one of"),
        *(
            (("generate", "x", "--timeout", value), "error: --timeout: ")
            for value in ("nan", "inf", "0", "-1")
        ),
        (("timeline", "x", "--nonsense"), "error: No such option"),
        (("consistency", "--limit"), "error: "),
        (("acceptance",), "error: Missing option"),
        (("distill",), "error: Missing option"),
        (("nonsense",), "error: No such command 'nonsense'; see amusd --help"),
        *(
            ((*words, "--address", "localhost"), ADDRESS.format(command=words[0]))
            for words in (
                ("generate", "x"), ("compare", "x"), ("timeline", "x"), ("bench", "--prompts", "x")
            )
        ),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_in_one_line(
    words: tuple[str, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, output = outcome(words, monkeypatch, capsys)
    assert code == 2
    assert output.startswith(line)
    assert len(output.splitlines()) == 1
    assert "--help" in output


def test_no_command_at_all_shows_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = outcome((), monkeypatch, capsys)
    assert code == 2
    assert "Commands:" in output


def test_the_version_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = outcome(("--version",), monkeypatch, capsys)
    assert code == 0
    assert output.startswith("amusd ")


def test_brackets_of_addresses_and_models_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    errors.print("verify [::1]:50052 and synthetic[:key=value] and [draft]")
    assert "verify [::1]:50052 and synthetic[:key=value] and [draft]" in capsys.readouterr().err
