"""The metrics that dashboards and alerts may use."""

METRIC_NAMES = frozenset(
    {
        "amusd_requests_running",
        "amusd_requests_waiting",
        "amusd_sessions_open",
        "amusd_time_to_first_token_seconds",
        "amusd_request_seconds",
        "amusd_generation_tokens_total",
        "amusd_prompt_tokens_total",
        "amusd_spec_decode_num_drafted_tokens_total",
        "amusd_spec_decode_num_accepted_tokens_total",
        "amusd_spec_decode_num_accepted_tokens_per_pos_total",
        "amusd_spec_decode_num_wasted_tokens_total",
        "amusd_rollbacks_total",
        "amusd_verify_pass_seconds",
        "amusd_draft_step_seconds",
        "amusd_kv_tokens_reserved",
        "amusd_kv_tokens_max",
        "amusd_prefix_cache_hit_tokens_total",
        "amusd_prefix_cache_query_tokens_total",
        "amusd_device_memory_bytes",
        "amusd_device_utilization_ratio",
        "amusd_device_energy_joules_total",
        "amusd_request_failures_total",
        "amusd_pool_replicas",
    }
)
HISTOGRAMS = frozenset(
    {
        "amusd_time_to_first_token_seconds",
        "amusd_request_seconds",
        "amusd_verify_pass_seconds",
        "amusd_draft_step_seconds",
    }
)
