"""The metrics of all services: names, meanings, labels and buckets.

Names follow vLLM where it has the metric, behind the prefix ``amusd_``.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["draft", "verify", "orchestrator", "gateway"]

_ALL: tuple[Role, ...] = ("orchestrator", "draft", "verify")
ENGINES: tuple[Role, ...] = ("draft", "verify")
_ORCHESTRATOR: tuple[Role, ...] = ("orchestrator",)

# Seconds of a pass, from a draft step on a GPU (1 ms) to a prefill chunk on CPU (seconds).
_PASS_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15,
    0.25, 0.5, 1.0, 2.5, 5.0,
)  # fmt: skip
_FIRST_TOKEN_BUCKETS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
_LENGTH_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip
_SESSION_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

_OF_REQUEST = ("model_name", "strategy")
"""Labels of what the orchestrator counts of requests. Draft and verify services have none."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its meaning, and the services that export it."""

    name: str
    meaning: str
    roles: tuple[Role, ...] = _ALL
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram. Empty for gauges and counters; counters end in ``_total``."""
    is_of_request: bool = False
    """Whether the orchestrator exports it by the model's name and the strategy of the request."""

    def labels_for(self, role: Role) -> tuple[str, ...]:
        """Return its labels in a service of this role."""
        is_labelled = self.is_of_request and role == "orchestrator"
        return (*_OF_REQUEST, *self.labels) if is_labelled else self.labels


METRICS = (
    Metric(
        "amusd_requests_running",
        "Requests with a place in the batch (draft, verify) or with a first token (orchestrator).",
    ),
    Metric(
        "amusd_requests_waiting",
        "Requests that wait for KV cache or for a place in the batch (draft, verify), or for a "
        "first token (orchestrator).",
    ),
    Metric("amusd_sessions_open", "Requests that were accepted and have not ended."),
    Metric(
        "amusd_time_to_first_token_seconds",
        "Time from the arrival of a request to its first token.",
        buckets=_FIRST_TOKEN_BUCKETS,
        is_of_request=True,
    ),
    Metric(
        "amusd_inter_token_latency_seconds",
        "Time between two chunks of an output. A chunk has the tokens of one pass, so there are "
        "fewer of these times than tokens.",
        _ORCHESTRATOR,
        buckets=_TOKEN_BUCKETS,
        is_of_request=True,
    ),
    Metric(
        "amusd_time_per_output_token_seconds",
        "Mean time of a token of an output after its first chunk.",
        _ORCHESTRATOR,
        buckets=_TOKEN_BUCKETS,
        is_of_request=True,
    ),
    Metric(
        "amusd_request_seconds",
        "Time from the arrival of a request to its end, including failed and refused requests.",
        buckets=_REQUEST_BUCKETS,
        is_of_request=True,
    ),
    Metric(
        "amusd_request_prompt_tokens",
        "Length of a prompt, in tokens.",
        _ORCHESTRATOR,
        buckets=_LENGTH_BUCKETS,
        is_of_request=True,
    ),
    Metric(
        "amusd_request_generation_tokens",
        "Length of an output, in tokens, also if it was cancelled or failed.",
        _ORCHESTRATOR,
        buckets=_LENGTH_BUCKETS,
        is_of_request=True,
    ),
    Metric(
        "amusd_request_success_total",
        "Outputs that ended as asked, by the reason of their end: stop or length.",
        _ORCHESTRATOR,
        ("finished_reason",),
        is_of_request=True,
    ),
    Metric(
        "amusd_generation_tokens_total",
        "Tokens that the service produced: output tokens, verified tokens or drafted tokens.",
        is_of_request=True,
    ),
    Metric("amusd_prompt_tokens_total", "Prompt tokens of accepted requests.", is_of_request=True),
    Metric(
        "amusd_passes_total",
        "Passes of the verify model in ended generations. Output tokens / passes is tokens a pass.",
        _ORCHESTRATOR,
        is_of_request=True,
    ),
    Metric(
        "amusd_spec_decode_num_drafts_total",
        "Passes of the verify model that checked proposals.",
        _ORCHESTRATOR,
        is_of_request=True,
    ),
    Metric(
        "amusd_spec_decode_num_draft_tokens_total",
        "Drafted tokens of ended generations, by what wrote them: model or lookup.",
        _ORCHESTRATOR,
        ("source",),
        is_of_request=True,
    ),
    Metric(
        "amusd_spec_decode_num_accepted_tokens_total",
        "Drafted tokens that the verify model accepted, and that the output holds, by source.",
        _ORCHESTRATOR,
        ("source",),
        is_of_request=True,
    ),
    Metric(
        "amusd_spec_decode_num_rejected_tokens_total",
        "Drafted tokens that the verify model rejected. Acceptance is accepted / (accepted + "
        "rejected).",
        _ORCHESTRATOR,
        is_of_request=True,
    ),
    Metric(
        "amusd_spec_decode_num_accepted_tokens_per_pos_total",
        "Accepted tokens by position in a pass, from 0.",
        _ORCHESTRATOR,
        ("position",),
        is_of_request=True,
    ),
    Metric(
        "amusd_spec_decode_num_wasted_tokens_total",
        "Drafted tokens that were never compared, because an earlier token was rejected or the "
        "output had ended.",
        _ORCHESTRATOR,
        is_of_request=True,
    ),
    Metric(
        "amusd_rollbacks_total",
        "Rollbacks of the draft to the verified position.",
        ("orchestrator", "draft"),
    ),
    Metric(
        "amusd_branches_total",
        "Branches that were held: continuations for other outcomes of a pass.",
        _ORCHESTRATOR,
    ),
    Metric(
        "amusd_branch_hits_total",
        "Branches that an epoch began with, so that the next pass did not wait for the draft.",
        _ORCHESTRATOR,
    ),
    Metric("amusd_branches_prepared_total", "Branches that were drafted.", ("draft",)),
    Metric("amusd_branch_tokens_total", "Tokens drafted for branches.", ("draft",)),
    Metric(
        "amusd_branch_rollback_hits_total",
        "Rollbacks whose outcome a branch was drafted for.",
        ("draft",),
    ),
    Metric(
        "amusd_branch_starts_total",
        "Rejections for which a branch was there, so that the next pass did not wait.",
        ("verify",),
    ),
    Metric("amusd_branches_held", "Branches of all sessions that are held now.", ("verify",)),
    Metric(
        "amusd_verify_pass_seconds",
        "Time of a verify pass over its whole batch.",
        ("verify",),
        buckets=_PASS_BUCKETS,
    ),
    Metric(
        "amusd_draft_step_seconds",
        "Time of a draft step over its whole batch.",
        ("draft",),
        buckets=_PASS_BUCKETS,
    ),
    Metric(
        "amusd_pass_sessions",
        "Batch size: sessions in a verify pass or draft step.",
        ENGINES,
        buckets=_SESSION_BUCKETS,
    ),
    Metric(
        "amusd_branch_seconds_total",
        "Time of draft steps that went into branches: their share by tokens.",
        ("draft",),
    ),
    Metric(
        "amusd_pass_failures_total",
        "Batches in which a pass failed. The sessions that caused it have ended.",
        ENGINES,
    ),
    Metric(
        "amusd_engine_healthy",
        "1 while the engine works, 0 while it hangs or fails and the service is NOT_SERVING.",
        ENGINES,
    ),
    Metric("amusd_kv_tokens_reserved", "KV cache in use, in tokens.", ENGINES),
    Metric("amusd_kv_tokens_max", "Capacity of the KV cache, in tokens.", ENGINES),
    Metric(
        "amusd_prefix_cache_hit_tokens_total",
        "Prompt tokens found in the prefix cache.",
        ENGINES,
    ),
    Metric(
        "amusd_prefix_cache_query_tokens_total",
        "Prompt tokens looked up in the prefix cache.",
        ENGINES,
    ),
    Metric(
        "amusd_device_memory_bytes",
        "Memory in use on the GPU, by all processes.",
        ENGINES,
        ("device",),
    ),
    Metric(
        "amusd_device_utilization_ratio",
        "Share of the last sample period in which the GPU was busy, 0 to 1.",
        ENGINES,
        ("device",),
    ),
    Metric(
        "amusd_device_energy_joules_total",
        "Energy used by the GPU since its driver was loaded.",
        ENGINES,
        ("device",),
    ),
    Metric(
        "amusd_request_failures_total",
        "Requests that ended with an error, by gRPC status.",
        labels=("status",),
    ),
    Metric(
        "amusd_pool_replicas",
        "Draft and verify replicas known to the orchestrator, by state.",
        _ORCHESTRATOR,
        ("role", "state"),
    ),
    Metric("amusd_build_info", "1, with the version of the service.", labels=("version",)),
)

METRIC_NAMES = frozenset(metric.name for metric in METRICS)
"""The names of all metrics of all services."""

BY_NAME = {metric.name: metric for metric in METRICS}


def meaning_of(name: str) -> str:
    """Return the meaning of a metric."""
    return BY_NAME[name].meaning


def names_of(role: Role) -> set[str]:
    """Return the names of the metrics of a service."""
    return {metric.name for metric in METRICS if role in metric.roles}
