"""Channels to other services, and the gRPC options of both ends of a connection.

gRPC would send every call through the proxy that the environment names, loopback included. Services
of a cluster are dialled directly, so a proxy is used only where a setting asks for it.
"""

from typing import Any

import grpc
import grpc.aio

from amusd.fleet.endpoint import Endpoint, parse_endpoint

MAX_MESSAGE_BYTES = 4 * 1024 * 1024

_MESSAGE_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_MESSAGE_OPTIONS,
    # By default, a second server would silently share the port of the first.
    ("grpc.so_reuseport", 0),
    # Accept the keepalive pings of _CHANNEL_OPTIONS.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]

_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    *_MESSAGE_OPTIONS,
    # A peer that vanishes without closing the connection is detected after 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Channels must not share connections through the process-wide pool.
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(address: str, use_proxy: bool = False) -> grpc.aio.Channel:
    """Return a channel to ``host:port``; it connects at its first call.

    Raises:
        InvalidInputError: the address is not of this form.
    """
    endpoint = parse_endpoint(address)
    return grpc.aio.insecure_channel(str(endpoint), channel_options(endpoint, use_proxy))


def channel_options(endpoint: Endpoint, use_proxy: bool) -> list[tuple[str, Any]]:
    """Return the options of a channel; this machine itself is never reached through a proxy."""
    is_proxied = use_proxy and not endpoint.is_loopback
    return [*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(is_proxied))]
