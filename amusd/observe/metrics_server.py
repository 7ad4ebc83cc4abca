"""Serves a Prometheus registry over plain HTTP, on all addresses of a host."""

import socket
import socketserver
import threading
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from amusd.fleet.endpoint import Endpoint
from amusd.rpc.listening import bind_all, reported

_REQUEST_SECONDS = 10.0


class _Handler(WSGIRequestHandler):
    """Answers one scrape, without a line in the log; a peer that stalls is closed."""

    timeout = _REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class _Server(ThreadingWSGIServer):
    """A server on a socket that is bound already."""

    def __init__(self, bound: socket.socket, app: Any) -> None:
        # The base class would look up the name of the host, which a slow name server delays.
        socketserver.BaseServer.__init__(self, bound.getsockname(), _Handler)
        self.socket = bound
        self.server_name, self.server_port = bound.getsockname()[:2]
        self.setup_environ()
        self.set_app(app)
        self.server_activate()


class MetricsServer:
    """Serves a registry at ``/metrics`` until it is closed."""

    def __init__(self, registry: CollectorRegistry, endpoint: Endpoint) -> None:
        """Listen at ``endpoint``.

        Raises:
            UnavailableError: the port is taken, or the host is not an address of this machine.
        """
        advice = "choose another port with --metrics-port, or 0 for no metrics"
        app = make_wsgi_app(registry)
        with reported(endpoint, "serve metrics on", advice):
            self._servers = [_Server(bound, app) for bound in bind_all(endpoint)]
        self._threads = [
            threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()
