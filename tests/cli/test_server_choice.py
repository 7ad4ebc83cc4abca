"""Every command that takes an address reaches a server with TLS and a key."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from amusd.cli.app import app
from amusd.protocol.errors import InvalidInputError, UnavailableError
from tests.clients.fake_orchestrator import (
    FakeOrchestrator,
    chunk,
    completion,
    make_certificate,
    serving,
)


@pytest.fixture(scope="module")
def protected(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[FakeOrchestrator, str, Path]]:
    """An orchestrator behind TLS, its address and the certificate to trust."""
    key, chain = make_certificate(tmp_path_factory.mktemp("certificate"))
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), chain.read_bytes())])
    fake = FakeOrchestrator([chunk("a", 1, 2, 3), completion()])
    with serving(fake, credentials) as address:
        yield fake, address, chain


@pytest.fixture(params=["generate", "chat", "compare", "bench", "timeline"])
def words(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A short call of each command."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n')
    return {
        "generate": ["generate", "x"],
        "chat": ["chat"],
        "compare": ["compare", "x", "--strategies", "amusd", "--repeat", "1"],
        "bench": ["bench", "--prompts", str(prompts), "--strategies", "amusd"],
        "timeline": ["timeline", "x", "--output", str(tmp_path / "drawn")],
    }[str(request.param)]


def test_a_command_sends_its_key_over_tls(
    protected: tuple[FakeOrchestrator, str, Path], words: list[str]
) -> None:
    fake, address, chain = protected
    fake.requests.clear()
    fake.metadata.clear()
    flags = ["--address", address, "--ca", str(chain), "--api-key", "secret"]
    done = CliRunner().invoke(app, [*words, *flags], input="x\n")
    if words[0] == "timeline":  # this orchestrator records none
        assert isinstance(done.exception, UnavailableError)
        assert "returned no timeline" in str(done.exception)
    else:
        assert done.exit_code == 0, done.output
    assert fake.requests
    assert {one["authorization"] for one in fake.metadata} == {"Bearer secret"}


def test_a_command_trusts_only_known_certificates(
    protected: tuple[FakeOrchestrator, str, Path], words: list[str]
) -> None:
    _, address, _ = protected
    done = CliRunner().invoke(app, [*words, "--address", address, "--tls"], input="x\n")
    failure = str(done.exception) + done.output
    assert "check tls and ca" in failure


def test_certificates_that_cannot_be_read_are_refused(words: list[str]) -> None:
    flags = ["--address", "127.0.0.1:9", "--ca", "/nowhere.pem"]
    done = CliRunner().invoke(app, [*words, *flags], input="x\n")
    assert isinstance(done.exception, InvalidInputError)
    assert "cannot read certificates from /nowhere.pem" in str(done.exception)
