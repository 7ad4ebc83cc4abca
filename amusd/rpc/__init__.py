"""gRPC ground: server shell, channels, error statuses, codec; no model and no session logic."""
