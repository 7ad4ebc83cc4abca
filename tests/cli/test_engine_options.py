"""Options of engines on their way from our own commands to the services that they start."""

import pytest

from amusd.cli.engine_options import flags_of
from amusd.cli.local_services import LocalSettings, local_services
from amusd.client import Client, Options
from amusd.engine.interface import EngineOptions, Numerics, WeightFormat
from amusd.prompts import Prompt
from tests.process.synthetic import expected_output

MODEL = "synthetic:vocabulary=300,batch=4"
OPTIONS = EngineOptions(4, 64, False, Numerics.EXACT, WeightFormat.INT8)


def test_only_a_verify_service_is_told_of_numerics() -> None:
    common = ["--max-batch", "4", "--cache-mib", "64", "--no-reuse-prefixes", "--weights", "int8"]
    assert flags_of("draft", OPTIONS) == common
    assert flags_of("verify", OPTIONS) == [*common, "--numerics", "exact"]


def test_without_options_a_service_chooses_itself() -> None:
    assert flags_of("verify", None) == []


@pytest.mark.process
def test_services_of_our_own_start_with_the_options_they_are_given() -> None:
    settings = LocalSettings(
        draft=MODEL, verify=MODEL, draft_options=OPTIONS, verify_options=OPTIONS
    )
    with local_services(settings) as services, Client(services.address, 60) as client:
        generation = client.generate(Prompt(tokens=(1, 2)), Options(max_tokens=20)).wait()
    assert generation.tokens == expected_output(MODEL, (1, 2), 20)
