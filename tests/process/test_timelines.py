"""``amusd timeline`` with real services: trace and picture of one generation."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from amusd.analysis.device_timeline import device_timelines
from amusd.analysis.timeline import Timeline
from amusd.cli.trace_file import DRAFT, MESSAGES, VERIFY
from amusd.client import Client, Generation, Options
from amusd.prompts import Prompt
from amusd.protocol.events import Proposal, Rollback, Verdict
from amusd.protocol.strategy import Strategy
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.process.services import VERIFY_MODEL, Trio, amusd
from tests.process.synthetic_models import expected_output

pytestmark = pytest.mark.process

PROMPT = tuple(range(1, 9))


def generate(client: Client, strategy: Strategy, timeline: bool = True) -> Generation:
    options = Options(strategy, 40, timeline=timeline)
    return client.generate(Prompt(tokens=PROMPT), options).wait()


def recorded(generation: Generation) -> Timeline:
    assert generation.timeline is not None
    return generation.timeline


# What the orchestrator records


@pytest.mark.parametrize("strategy", Strategy)
def test_a_timeline_holds_every_step_and_pass_of_the_statistics(
    client: Client, strategy: Strategy
) -> None:
    generation = generate(client, strategy)
    timeline, statistics = recorded(generation), generation.summary()
    messages = [event.message for event in timeline.events]
    verdicts = [one for one in messages if isinstance(one, Verdict)]
    proposals = [one for one in messages if isinstance(one, Proposal)]
    assert generation.tokens == expected_output(VERIFY_MODEL, PROMPT, 40)
    assert not timeline.is_truncated
    assert len(verdicts) == statistics.num_passes
    assert sum(len(one.tokens) for one in proposals) == statistics.num_drafted
    assert sum(isinstance(one, Rollback) for one in messages) == statistics.num_rollbacks
    assert sum(len(one.steps) for one in proposals) == sum(one.num_steps for one in proposals)
    # The tests before may leave sessions that share a step for a moment.
    devices = device_timelines(timeline)
    assert devices.draft.busy_seconds == pytest.approx(statistics.draft_busy_seconds, rel=0.2)
    assert devices.verify.busy_seconds == pytest.approx(statistics.verify_busy_seconds, rel=0.2)
    assert devices.ended_seconds == pytest.approx(statistics.wall_seconds, rel=0.2)


def test_on_one_host_the_clocks_agree(client: Client) -> None:
    devices = device_timelines(recorded(generate(client, Strategy.AMUSD)))
    assert devices.draft.clock_shift_seconds == devices.verify.clock_shift_seconds == 0.0


def test_only_amusd_lets_both_devices_work_at_the_same_time(client: Client) -> None:
    shares = {}
    for strategy in Strategy:
        devices = device_timelines(recorded(generate(client, strategy)))
        shares[strategy] = devices.overlap_seconds / devices.verify.busy_seconds
    assert shares[Strategy.AUTOREGRESSIVE] == 0.0
    # Both compute the prompt at the same time.
    assert shares[Strategy.SPECULATIVE] < shares[Strategy.AMUSD]


def test_a_timeline_is_recorded_only_on_request(client: Client) -> None:
    assert generate(client, Strategy.AMUSD, timeline=False).timeline is None


# What the command writes


def slices(trace: dict[str, Any], thread: int, idle: bool = False) -> list[dict[str, Any]]:
    events = [
        one for one in trace["traceEvents"]
        if one["ph"] == "X" and one["tid"] == thread and (one["cat"] == "idle") == idle
    ]  # fmt: skip
    return sorted(events, key=lambda one: float(one["ts"]))


@pytest.mark.parametrize("strategy", [strategy.value for strategy in Strategy])
def test_the_command_writes_a_trace_and_a_picture(
    trio: Trio, tmp_path: Path, strategy: str
) -> None:
    prefix = tmp_path / "one"
    done = amusd(
        "timeline", "hello", "--raw", "--strategy", strategy, "--max-tokens", "30",
        "--output", str(prefix), "--address", trio.orchestrator.address,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{strategy}, 30 tokens in" in done.stdout
    trace = json.loads((tmp_path / "one.json").read_text())
    check_slices(trace)
    about = trace["otherData"]
    assert about["strategy"] == strategy
    assert about["num_output_tokens"] == 30
    messages = [one["name"] for one in trace["traceEvents"] if one["ph"] == "i"]
    assert messages.count("verdict") == about["num_passes"] == len(slices(trace, VERIFY))
    assert messages.count("rollback") == about["num_rollbacks"]
    assert bool(slices(trace, DRAFT)) == (strategy != "autoregressive")
    check_picture(tmp_path / "one.png")


def check_slices(trace: dict[str, Any]) -> None:
    """Check that work and idle time alternate, and that arrows begin and end in work."""
    for thread in (DRAFT, VERIFY):
        both = sorted(
            slices(trace, thread) + slices(trace, thread, idle=True), key=lambda one: one["ts"]
        )
        assert both[0]["ts"] == 0.0
        for one, following in pairwise(both):
            assert one["ts"] + one["dur"] == pytest.approx(following["ts"], abs=0.01)
    threads = {one["tid"] for one in trace["traceEvents"] if "tid" in one}
    assert threads == {DRAFT, VERIFY, MESSAGES}
    for arrow in (one for one in trace["traceEvents"] if one["ph"] in "sf"):
        assert any(
            one["ts"] <= arrow["ts"] <= one["ts"] + one["dur"]
            for one in slices(trace, arrow["tid"])
        )


def check_picture(path: Path) -> None:
    picture = matplotlib.image.imread(path)  # [height, width, channels]
    assert picture.shape[0] > 400
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10


def test_the_picture_shows_the_part_that_is_asked_for(trio: Trio, tmp_path: Path) -> None:
    arguments = (
        "timeline", "hello", "--raw", "--output", str(tmp_path / "part"), "--force",
        "--address", trio.orchestrator.address,
    )  # fmt: skip
    done = amusd(*arguments, "--from", "20", "--to", "60")
    assert done.returncode == 0, done.stderr
    check_picture(tmp_path / "part.png")
    late = amusd(*arguments, "--from", "1e9")
    assert late.returncode == 1
    assert "--from 1e+09 lies after the end" in late.stderr


BAD_COMMANDS = {
    "an empty prompt": (["", "--raw"], "prompt is empty"),
    "a window without time": (["x", "--from", "5", "--to", "5"], "--to 5 is not after --from 5"),
    "a folder that is not there": (["x", "--output", "/nowhere/at/all"], "/nowhere/at"),
    "a folder as output": (["x", "--output", "/"], "/ is a folder"),
    "nothing at the address": (["x", "--address", "127.0.0.1:9"], "orchestrator at 127.0.0.1:9"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_ends_with_a_line_that_says_why(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD_COMMANDS[case]
    done = amusd("timeline", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_overwritten_only_with_force(trio: Trio, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_text("dear")
    arguments = (
        "timeline", "hello", "--raw", "--max-tokens", "5", "--output", str(tmp_path / "one"),
        "--address", trio.orchestrator.address,
    )  # fmt: skip
    refused = amusd(*arguments)
    assert refused.returncode == 1
    assert "one.png exists" in refused.stderr
    assert (tmp_path / "one.png").read_text() == "dear"
    assert not (tmp_path / "one.json").exists()
    assert amusd(*arguments, "--force").returncode == 0
    check_picture(tmp_path / "one.png")


def test_without_matplotlib_the_command_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None in sys.modules is how Python is told that a module is not there.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['matplotlib'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = subprocess.run(
        [sys.executable, "-m", "amusd", "timeline", "hello", "--output", str(tmp_path / "one")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'amusd[timeline]'" in done.stderr


def test_a_streamed_timeline_is_the_recorded_one(trio: Trio) -> None:
    request = orchestrator_pb2.GenerateRequest(
        text="Hello", max_tokens=24, timeline=True, stream_timeline=True
    )
    with trio.orchestrator.channel() as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        responses = list(stub.Generate(request, timeout=30))
    events = [one.event for one in responses if one.HasField("event")]
    completion = responses[-1].completion
    assert [one.event for one in events] == list(completion.timeline.events)
    texts = {named.token_id: named.text for one in events for named in one.texts}
    assert len(texts) == sum(len(one.texts) for one in events)  # each is named once
    drafted = {token for one in events for token in one.event.proposal.token_ids}
    assert drafted
    assert {token: bytes([token]) for token in drafted if token < 256}.items() <= texts.items()
    tokens = [token for one in responses for token in one.chunk.token_ids]
    assert len(tokens) == 24
    assert set(tokens) <= texts.keys()
