"""The health of an engine: which passes failed, how long a pass may take, and what is wrong.

Rules of this file
- No torch, grpc, asyncio or clock.
- The engine thread writes. The watchdog reads, and writes ``problem`` only. Each attribute is one
  reference, so no lock is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from amusd.settings import check_bounds, setting

_DECAY = 0.99
"""The slowest recent pass counts a hundredth less after each pass."""
_AFTER_HANG = 2.0


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """When an engine counts as failing or hung, and when its service is to be restarted."""

    max_failed_passes: int = setting(
        5,
        "Passes that fail in a row before the service tests its engine. If the test fails too, "
        "the service is NOT_SERVING until a test succeeds.",
        unit="passes",
        at_least=1,
    )
    hang_factor: float = setting(
        20.0,
        "A pass hangs, and the service is NOT_SERVING, after this many times the slowest recent "
        "pass.",
        unit="passes",
        at_least=1,
    )
    hang_floor_seconds: float = setting(
        15.0, "Least time after which a pass hangs; 0: a pass may take any time.", at_least=0
    )
    restart_after_seconds: float = setting(
        30.0,
        "Time after which a service that still hangs or fails is not live, so that Kubernetes "
        "restarts it.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_bounds(self)


class EngineHealth:
    """What is known of the health of one engine.

    ``num_begun`` counts passes, those of a test included. ``fault`` says how the last test
    failed, empty if the engine works. ``problem`` is why the service is NOT_SERVING, as the
    watchdog found; empty if nothing is wrong.
    """

    def __init__(
        self,
        settings: HealthSettings | None = None,
        on_failed_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """Start healthy. ``on_failed_batch`` is called on the engine thread."""
        self.settings = settings or HealthSettings()
        self.num_begun = 0
        self.num_failed_in_row = 0
        self.fault = ""
        self.problem = ""
        self._on_failed_batch = on_failed_batch
        self._slowest_seconds = 0.0

    @property
    def max_pass_seconds(self) -> float:
        """How long a pass may take."""
        settings = self.settings
        return max(settings.hang_floor_seconds, settings.hang_factor * self._slowest_seconds)

    @property
    def is_suspect(self) -> bool:
        """Whether so many passes failed in a row that the engine has to be tested."""
        return self.num_failed_in_row >= self.settings.max_failed_passes

    def pass_began(self) -> None:
        """Count a pass that begins."""
        self.num_begun += 1

    def pass_ended(self, seconds: float) -> None:
        """Record a pass that succeeded: the engine works.

        One that hung before is not usual: the next ones may take twice its time.
        """
        if self._slowest_seconds and seconds > self.max_pass_seconds:
            seconds *= min(1.0, _AFTER_HANG / self.settings.hang_factor)
        self._slowest_seconds = max(seconds, _DECAY * self._slowest_seconds)
        self.num_failed_in_row = 0
        self.fault = ""

    def pass_failed(self) -> None:
        """Record a pass that raised an exception, or has tokens for none of its sessions."""
        self.num_failed_in_row += 1

    def batch_failed(self) -> None:
        """Record a batch with such a pass, however often it ran again in parts."""
        self._on_failed_batch()

    def tested(self, fault: str) -> None:
        """Record a test: how it failed, or empty if it succeeded."""
        self.fault = fault
        if not fault:
            self.num_failed_in_row = 0
