"""The openai package, connected to a gateway before a scripted orchestrator."""

from collections.abc import AsyncIterator

import openai
import pytest

from tests.gateway.scripted_orchestrator import ScriptedOrchestrator, served_gateway


@pytest.fixture
def orchestrator() -> ScriptedOrchestrator:
    return ScriptedOrchestrator()


@pytest.fixture
async def client(orchestrator: ScriptedOrchestrator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served_gateway(orchestrator) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="-", max_retries=0) as made,
    ):
        yield made
