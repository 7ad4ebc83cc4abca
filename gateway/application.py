"""The routes of the gateway."""

import time
from functools import partial
from http import HTTPStatus
from typing import Any

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from amusd.v1 import model_pb2, orchestrator_pb2
from gateway import api_errors
from gateway.api_errors import ApiError
from gateway.chat_format import ChatFormat
from gateway.chat_request import chat_job
from gateway.completion_format import CompletionFormat
from gateway.completion_request import completion_job
from gateway.decode_events import DecodeAnswer, decode_job
from gateway.gateway_metrics import GatewayMetrics
from gateway.gateway_settings import GatewaySettings
from gateway.generation_endpoint import GenerationEndpoint, model_names
from gateway.http_admission import Admission
from gateway.openai_answer import OpenAIAnswer
from gateway.orchestrator_client import OrchestratorClient
from gateway.page_files import page_routes

_HEALTH_SECONDS = 2.0


def make_application(
    orchestrator: OrchestratorClient,
    settings: GatewaySettings,
    admission: Admission,
    metrics: GatewayMetrics,
) -> Starlette:
    """Return the ASGI application."""
    parts = (orchestrator, settings, admission, metrics)
    information = _Information(orchestrator, settings, admission, metrics)
    of_completions = partial(OpenAIAnswer, CompletionFormat)
    completions = GenerationEndpoint("completions", completion_job, of_completions, *parts)
    of_chats = partial(OpenAIAnswer, ChatFormat)
    chats = GenerationEndpoint("chat_completions", chat_job, of_chats, *parts)
    decodes = GenerationEndpoint("decode", decode_job, DecodeAnswer, *parts)
    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chats, methods=["POST"]),
        Route("/v1/models", information.models),
        Route("/v1/models/{name:path}", information.model),
        Route("/health", information.health),
        Route("/live", information.live),
        Route("/metrics", information.prometheus),
        Route("/decode", decodes, methods=["POST"]),
        Route("/server", information.server),
        *page_routes(),
    ]
    handlers = {HTTPException: _http_error, ApiError: _api_error}
    return Starlette(routes=routes, exception_handlers=handlers)


class _Information:
    """The endpoints that tell what is served, and how it does."""

    def __init__(
        self,
        orchestrator: OrchestratorClient,
        settings: GatewaySettings,
        admission: Admission,
        metrics: GatewayMetrics,
    ) -> None:
        self._orchestrator = orchestrator
        self._settings = settings
        self._admission = admission
        self._metrics = metrics
        self._started = int(time.time())

    async def models(self, request: Request) -> Response:
        """List the names of the model."""
        return JSONResponse({"object": "list", "data": await self._described()})

    async def model(self, request: Request) -> Response:
        """Describe the model of one name."""
        name = request.path_params["name"]
        for described in await self._described():
            if described["id"] == name:
                return JSONResponse(described)
        message = f"the model {name!r} does not exist"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def health(self, request: Request) -> Response:
        """Tell whether generations would be served: 200, or 503 with the reason."""
        if self._admission.refusal:
            raise api_errors.unavailable(self._admission.refusal)
        await self._orchestrator.ask(_HEALTH_SECONDS)
        return JSONResponse({"status": "ok"})

    async def live(self, request: Request) -> Response:
        """Tell that the process works, whatever the orchestrator does."""
        return JSONResponse({"status": "ok"})

    async def prometheus(self, request: Request) -> Response:
        """Export the metrics of the gateway."""
        content = prometheus_client.generate_latest(self._metrics.registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def server(self, request: Request) -> Response:
        """Tell the page which models decode, and by which strategies."""
        info = await self._orchestrator.info()
        names = [orchestrator_pb2.Strategy.Name(one) for one in info.strategies]
        return JSONResponse(
            {
                "verify_model": _named(info.verify_model),
                "draft_model": _named(info.draft_model) if info.HasField("draft_model") else None,
                "strategies": [one.removeprefix("STRATEGY_").lower() for one in names],
            }
        )

    async def _described(self) -> list[dict[str, Any]]:
        info = await self._orchestrator.info()
        return [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "amusd",
                "root": info.verify_model.name,
                "max_model_len": info.limits.max_context,
            }
            for name in model_names(self._settings, info)
        ]


def _named(model: model_pb2.ModelInfo) -> dict[str, Any]:
    return {"name": model.name, "num_parameters": model.num_parameters}


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return JSONResponse(error.body(), error.status, headers)


def _http_error(request: Request, error: Exception) -> Response:
    """Answer a wrong path or method in the format of all errors."""
    assert isinstance(error, HTTPException)
    reason = HTTPStatus(error.status_code).phrase.lower()
    message = f"{request.method} {request.url.path}: {reason}"
    return JSONResponse(
        ApiError(error.status_code, message).body(), error.status_code, error.headers
    )
