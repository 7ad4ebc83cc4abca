"""The services with the settings that each takes, and the defaults of these."""

from amusd.observe.metric_list import Role
from amusd.rpc.server import Listen
from amusd.serving.engine_settings import EngineServiceSettings
from amusd.settings import Setting, settings_in
from draft_service.draft_settings import DraftServiceSettings
from gateway.gateway_settings import GatewaySettings
from orchestrator.orchestrator_settings import OrchestratorSettings

ORCHESTRATOR = OrchestratorSettings()
DRAFT = DraftServiceSettings()
GATEWAY = GatewaySettings()
VERIFY = EngineServiceSettings(listen=Listen(port=50052))

SETTINGS: dict[Role, tuple[Setting, ...]] = {
    "orchestrator": settings_in(ORCHESTRATOR),
    "draft": settings_in(DRAFT),
    "verify": settings_in(VERIFY),
    "gateway": settings_in(GATEWAY),
}
"""What ``amusd serve`` takes for each service."""
