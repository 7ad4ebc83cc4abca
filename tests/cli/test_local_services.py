"""Services that our own commands start, and with which settings."""

import pytest

from amusd.cli.local_services import LocalSettings, local_services
from amusd.cli.service_settings import SETTINGS
from amusd.client import Client, Options
from amusd.engine.interface import EngineOptions, Numerics, WeightFormat
from amusd.prompts import Prompt
from amusd.protocol.errors import UnavailableError
from amusd.settings import flags_of
from tests.process.synthetic import expected_output

MODEL = "synthetic:vocabulary=300,batch=4"
OPTIONS = EngineOptions(4, 64, False, Numerics.EXACT, WeightFormat.INT8)


def test_only_a_verify_service_takes_numerics() -> None:
    common = ["--max-batch", "4", "--cache-mib", "64", "--no-reuse-prefixes"]
    weights = ["--weights", "int8"]
    assert flags_of(SETTINGS["draft"], OPTIONS) == [*common, *weights]
    assert flags_of(SETTINGS["verify"], OPTIONS) == [*common, "--numerics", "exact", *weights]


@pytest.mark.process
def test_local_services_start_with_the_options_they_are_given() -> None:
    settings = LocalSettings(
        draft=MODEL, verify=MODEL, draft_options=OPTIONS, verify_options=OPTIONS
    )
    with local_services(settings) as services, Client(services.address, 60) as client:
        generation = client.generate(Prompt(tokens=(1, 2)), Options(max_tokens=20)).wait()
    assert generation.tokens == expected_output(MODEL, (1, 2), 20)


@pytest.mark.process
def test_settings_that_are_not_given_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AMUSD_MAX_SESSIONS", "0")
    with (
        pytest.raises(UnavailableError, match="the verify service did not start"),
        local_services(LocalSettings(draft="", verify=MODEL)),
    ):
        pass
    said = capfd.readouterr().err
    assert "error: AMUSD_MAX_SESSIONS (--max-sessions): 0 is out of range" in said
