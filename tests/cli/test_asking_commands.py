"""``amusd generate`` and ``amusd chat`` against an orchestrator on loopback in this process."""

import io
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from amusd.cli.app import app
from amusd.cli.generate_command import GenerateSettings
from amusd.cli.request_settings import RequestSettings
from amusd.client import Generation, Options
from amusd.protocol.errors import AmusdError, InvalidInputError
from amusd.protocol.strategy import Strategy
from amusd.settings import settings_in
from amusd.v1.sampling_pb2 import TokenLogprob
from tests.clients.fake_orchestrator import FakeOrchestrator, chunk, completion, serving

ANSWER = [chunk("Bl", 1, 2), chunk("ue", 4), completion(text=".")]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeOrchestrator, str]]:
    fake = FakeOrchestrator(ANSWER)
    with serving(fake) as address:
        yield fake, address


@pytest.fixture
def fake(served: tuple[FakeOrchestrator, str], monkeypatch: pytest.MonkeyPatch) -> FakeOrchestrator:
    """The orchestrator that commands find by its variable."""
    fake, address = served
    fake.__init__(ANSWER)  # type: ignore[misc]  # as new for each test
    monkeypatch.setenv("AMUSD_ADDRESS", address)
    return fake


def run(*words: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(app, list(words), input=stdin)


def roles(request: Any) -> list[tuple[str, str]]:
    return [(one.role, one.content) for one in request.chat.messages]


def test_generate_streams_the_answer_and_keeps_figures_apart(fake: FakeOrchestrator) -> None:
    done = run("generate", "Why?")
    assert done.exit_code == 0, done.output
    assert done.stdout == "Blue.\n"
    assert "3 tokens in 0.50 s" in done.stderr
    assert "seed 7" in done.stderr
    assert roles(fake.requests[0]) == [("user", "Why?")]


def test_generate_sends_what_its_flags_say(fake: FakeOrchestrator, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    done = run(
        "generate", "Why?", "--temperature", "0.5", "--top-k", "40", "--top-p", "0.75",
        "--min-p", "0.25", "--seed", "3", "--repetition-penalty", "1.5", "--presence-penalty", "-1",
        "--frequency-penalty", "0.5", "--no-repeat-ngram-size", "4", "--stop", "a", "--stop", "b c",
        "--include-stop", "--ignore-eos", "--min-tokens", "2", "--max-tokens", "9",
        "--json-schema", str(schema), "--system", "Rhyme.", "--strategy", "speculative",
        "--lookahead", "5", "--logit-bias", "42=-1.5", "--logit-bias", "7=100",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (request,) = fake.requests
    assert roles(request) == [("system", "Rhyme."), ("user", "Why?")]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (
        0.5, 40, 0.75, 0.25,
    )  # fmt: skip
    assert (sampling.seed, sampling.repetition_penalty, sampling.presence_penalty) == (3, 1.5, -1)
    assert (sampling.frequency_penalty, sampling.no_repeat_ngram_size) == (0.5, 4)
    assert dict(sampling.logit_bias) == {42: -1.5, 7: 100}
    assert not request.HasField("logprobs")
    assert sampling.constraint.json_schema == '{"type": "object"}'
    assert list(request.stop) == ["a", "b c"]
    assert (request.include_stop, request.ignore_eos) == (True, True)
    assert (request.min_tokens, request.max_tokens, request.lookahead) == (2, 9, 5)


def test_every_flag_of_a_request_changes_its_options() -> None:
    changed: dict[str, Any] = {
        "strategy": Strategy.AMUSD, "stop": ("x",), "choice": ("y",), "regex": "z",
        "include_stop": True, "ignore_eos": True, "json_object": True,
        "json_schema": __file__, "grammar": __file__, "logit_bias": ((5, 1.0),),
    }  # fmt: skip
    for one in settings_in(RequestSettings()):
        settings = RequestSettings(**{one.name: changed.get(one.name, 1)})
        assert settings.options() != Options(), one.name


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (("--choice", "yes", "--choice", "no"), "choices", ["yes", "no"]),
        (("--regex", "[0-9]+"), "regex", "[0-9]+"),
        (("--json-object",), "json_object", True),
    ],
)
def test_generate_asks_for_a_form(
    fake: FakeOrchestrator, words: tuple[str, ...], field: str, value: object
) -> None:
    assert run("generate", "x", *words).exit_code == 0
    found = getattr(fake.requests[0].sampling.constraint, field)
    assert (list(found.texts) if field == "choices" else found) == value


@pytest.mark.parametrize("words", [("generate", "-"), ("generate",)])
def test_generate_reads_standard_input(fake: FakeOrchestrator, words: tuple[str, ...]) -> None:
    assert run(*words, stdin="Why\nso?\n").exit_code == 0
    assert run(*words, "--raw", stdin="Why\nso?\n").exit_code == 0
    chat, raw = fake.requests
    assert roles(chat) == [("user", "Why\nso?")]
    assert raw.text == "Why\nso?\n"


class Terminal(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_generate_without_a_prompt_in_a_terminal_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert app(["generate"], standalone_mode=False) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Missing argument 'PROMPT'; see ")
    assert line.endswith("generate --help")


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (("-",), b"", "the prompt is empty"),
        (("-",), b"\n", "the prompt is empty"),
        (("-",), b"\xff", "standard input is not UTF-8"),
        (("-",), b"x" * (4 * 1024 * 1024 + 1), "more than 4 MiB"),
        (("x", "--raw", "--system", "y"), b"", "use --raw or --system"),
        (("x", "--json-schema", "/nowhere"), b"", "cannot read /nowhere"),
        (("x", "--grammar", "/"), b"", "cannot read /"),
        (("x", "--regex", "a", "--json-object"), b"", "json_object and regex are set"),
        (("x", "--logprobs", "2"), b"", "add --json"),
        (("x", "--logit-bias", "5=1", "--logit-bias", "5=2"), b"", "a token has two biases"),
    ],
)
def test_generate_refuses_what_is_of_no_use(
    fake: FakeOrchestrator, words: tuple[str, ...], stdin: bytes, message: str
) -> None:
    done = run("generate", *words, stdin=stdin)
    assert isinstance(done.exception, InvalidInputError)
    assert message in str(done.exception)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--temperature", "nan"), "--temperature: nan is out of range, use 0 to 100"),
        (("--top-p", "0"), "--top-p: 0 is out of range, use more than 0, at most 1"),
        (("--seed", "-1"), "--seed: -1 is out of range, use 0 to 18446744073709551615"),
        (("--top-k", "many"), "--top-k: 'many' is not a whole number"),
        (("--n", "17"), "--n: 17 is out of range, use 1 to 16"),
        (("--logprobs", "21"), "--logprobs: 21 is out of range, use 0 to 20"),
        *(
            (
                ("--logit-bias", text),
                f"--logit-bias: {text!r} is not a token id and a number, as 42=-1.5",
            )
            for text in ("5", "=1", "5=", "sky=1", "5=1=2")
        ),
        *(
            (
                ("--logit-bias", text),
                f"--logit-bias: {text} is out of range, use an id from 0 and "
                "a bias from -100 to 100",
            )
            for text in ("-1=3", "4294967296=3", "5=nan", "5=100.5", "5=-inf")
        ),
    ],
)
def test_a_flag_out_of_range_is_refused_before_anything_starts(
    words: tuple[str, ...], line: str
) -> None:
    done = run("generate", "x", *words)
    assert done.exit_code == 2
    assert done.stderr == f"error: {line}; see amusd generate --help\n"


def test_generate_prints_one_json_object(fake: FakeOrchestrator) -> None:
    done = run("generate", "x", "--json")
    report = json.loads(done.stdout)
    assert (report["text"], report["tokens"], report["seed"]) == ("Blue.", [1, 2, 4], 7)
    assert report["finish_reason"] == "stop"
    assert report["statistics"]["num_output_tokens"] == 3
    assert report["statistics"]["tokens_per_pass"] == 1.5
    assert done.stderr == ""


@pytest.mark.parametrize(("wanted", "num_top"), [("0", 0), ("2", 2)])
def test_generate_prints_log_probabilities(
    fake: FakeOrchestrator, wanted: str, num_top: int
) -> None:
    answer = chunk("é", 1, 2)
    for token, text in ((1, b"\xc3"), (2, b"\xa9")):
        position = answer.chunk.logprobs.add()
        position.token.MergeFrom(TokenLogprob(token_id=token, logprob=-0.5, text=text))
        tops = [TokenLogprob(token_id=9, logprob=-0.25, text=b"b"), TokenLogprob(logprob=-inf)]
        position.top.extend(tops[:num_top])
    fake.responses = [answer, completion()]
    done = run("generate", "x", "--json", "--logprobs", wanted)
    assert done.exit_code == 0, done.output
    assert fake.requests[0].logprobs.num_top == num_top
    assert "Infinity" not in done.stdout
    first, second = json.loads(done.stdout)["logprobs"]
    assert (first["token"], first["text"], first["logprob"]) == (1, "\ufffd", -0.5)
    assert second["token"] == 2
    assert first["top"] == [
        {"token": 9, "text": "b", "logprob": -0.25}, {"token": 0, "text": "", "logprob": -9999.0},
    ][:num_top]  # fmt: skip


def test_generate_prints_no_log_probabilities_unasked(fake: FakeOrchestrator) -> None:
    assert "logprobs" not in json.loads(run("generate", "x", "--json").stdout)


def test_generate_prints_several_completions_apart(fake: FakeOrchestrator) -> None:
    fake.responses = [
        chunk("a", 1), chunk("b", 2, index=1), chunk("c", 3), completion(1), completion(0),
    ]  # fmt: skip
    assert run("generate", "x", "--n", "2").stdout == "[1] ac\n[2] b\n"
    lines = run("generate", "x", "--n", "2", "--json").stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["ac", "b"]
    assert fake.requests[0].num_completions == 2


def test_a_key_is_read_from_the_environment(
    fake: FakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMUSD_API_KEY", "secret")
    assert run("generate", "x").exit_code == 0
    assert fake.metadata[0]["authorization"] == "Bearer secret"
    assert "secret" not in repr(GenerateSettings())


def test_chat_keeps_the_conversation(fake: FakeOrchestrator) -> None:
    lines = ["Why?", "", "And now?", "/system Rhyme.", "/reset", " /x", "/what", "/help"]
    done = run("chat", "--system", "Be brief.", "--temperature", "1", stdin="\n".join(lines))
    assert done.exit_code == 0, done.output
    assert done.stdout == "Blue.\nBlue.\nBlue.\n"
    first, second, third = fake.requests
    assert roles(first) == [("system", "Be brief."), ("user", "Why?")]
    assert roles(second) == [*roles(first), ("assistant", "Blue."), ("user", "And now?")]
    assert roles(third) == [("system", "Rhyme."), ("user", "/x")]
    assert third.sampling.temperature == 1
    assert "there is no command /what: use /reset, /system, /help" in done.stderr
    assert "Ctrl-C ends an answer" in done.stderr


def test_chat_goes_on_after_an_error(fake: FakeOrchestrator) -> None:
    fake.refusals = [grpc.StatusCode.INVALID_ARGUMENT]
    done = run("chat", stdin="Too long?\nWhy?\n")
    assert done.exit_code == 0, done.output
    assert "error: orchestrator at" in done.stderr
    assert "not now" in done.stderr
    assert roles(fake.requests[1]) == [("user", "Why?")]


def test_chat_refuses_what_is_not_utf8(fake: FakeOrchestrator) -> None:
    done = run("chat", stdin=b"\xff\n")
    assert isinstance(done.exception, InvalidInputError)
    assert "standard input is not UTF-8" in str(done.exception)


def test_chat_says_at_once_that_nothing_answers() -> None:
    done = run("chat", "--address", "127.0.0.1:9", stdin="Why?\n")
    assert isinstance(done.exception, AmusdError)
    assert "start one with amusd up" in str(done.exception)


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    fake: FakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.num_free = 1
    reads: Callable[[Generation], Iterator[Any]] = Generation.__iter__

    def interrupting(self: Generation) -> Iterator[Any]:
        for number, piece in enumerate(reads(self)):
            yield piece
            if number == 0 and len(fake.requests) == 1:
                threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,)).start()

    monkeypatch.setattr(Generation, "__iter__", interrupting)
    done = run("chat", stdin="Why?\nAnd now?\n")
    assert done.exit_code == 0, done.output
    assert done.stdout == "Bl\nBlue.\n"
    assert "the answer was ended" in done.stderr
    assert roles(fake.requests[1]) == [
        ("user", "Why?"), ("assistant", "Bl"), ("user", "And now?"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "found", "other"),
    [
        ("amusd ch", "chat", "serve"),
        ("amusd generate --temp", "--temperature", "--top-k"),
        ("amusd compare --strat", "--strategies", "--repeat"),
        ("amusd serve ", "verify", "chat"),
        ("amusd serve verify --nume", "--numerics", "--port"),
        ("amusd up --draft-d", "--draft-device", "--port"),
    ],
)
def test_a_shell_completes_commands_and_flags(line: str, found: str, other: str) -> None:
    environment = {"_AMUSD_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(len(line.split(" ")) - 1)
    done = CliRunner().invoke(app, [], prog_name="amusd", env=environment)
    words = done.stdout.split()
    assert found in words
    assert other not in words
