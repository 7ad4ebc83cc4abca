"""Starts real commands as processes on loopback."""

import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.process.warm_commands import command_line

START_SECONDS = 60.0
VOCABULARY = 512
VERIFY_MODEL = f"synthetic:pass_ms=4,vocabulary={VOCABULARY},context=600"
DRAFT_MODEL = f"synthetic:agreement=0.7,pass_ms=1,vocabulary={VOCABULARY},context=600"


@dataclass
class Service:
    """A service process, its address and its log file."""

    role: str
    process: "subprocess.Popen[bytes]"
    address: str
    log: Path

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    def wait_until_serving(self, within_seconds: float = START_SECONDS) -> None:
        with self.channel() as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=within_seconds
            )
            for answer in watch:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    watch.cancel()
                    return

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def start_service(log: Path, role: str, *flags: str) -> Service:
    """Start ``amusd serve ROLE`` on a free port, unless the flags name one."""
    port = () if "--port" in flags else ("--port", "0")
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "amusd", "serve", role, "--grace", "1", *port, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    return listening(role, process, log)


def listening(role: str, process: "subprocess.Popen[bytes]", log: Path) -> Service:
    """Wait for the line with the address of a service; an empty address: it has ended."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(START_SECONDS), f"{role} prints no address: {log.read_text()}"
    words = process.stdout.readline().decode().split()
    return Service(role, process, words[-1] if words else "", log)


def becomes_true(condition: Callable[[], bool], within_seconds: float = 10.0) -> bool:
    """Wait until a condition holds that a service brings about; return whether it does in time."""
    end = time.monotonic() + within_seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


Starter = Callable[..., Service]


@dataclass(frozen=True)
class Trio:
    """Draft, verify and orchestrator that serve together."""

    draft: Service
    verify: Service
    orchestrator: Service


def start_trio(
    starter: Starter,
    verify_model: str = VERIFY_MODEL,
    draft_model: str = DRAFT_MODEL,
    draft_flags: tuple[str, ...] = (),
    verify_flags: tuple[str, ...] = (),
    orchestrator_flags: tuple[str, ...] = (),
) -> Trio:
    verify = starter("verify", "--model", verify_model, "--max-sessions", "64", *verify_flags)
    draft = starter("draft", "--model", draft_model, "--max-lookahead", "16", *draft_flags)
    # Statistics must not depend on how busy the machine is.
    orchestrator = starter(
        "orchestrator", "--verify", verify.address, "--draft", draft.address,
        "--draft-timeout", "3", "--verify-timeout", "20",
        "--no-adaptive-speculation", *orchestrator_flags,
    )  # fmt: skip
    orchestrator.wait_until_serving()
    return Trio(draft, verify, orchestrator)


def amusd(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return command_line().run("amusd", *arguments)
