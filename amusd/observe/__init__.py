"""Observability: metrics, traces and log lines. They never contain a prompt or an output."""
