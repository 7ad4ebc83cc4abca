"""Tools that know the API of OpenAI and vLLM, unchanged; each runs if it is on the path."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from amusd.pair import resolve_model
from tests.process.conftest import starting
from tests.process.services import becomes_true, start_trio

pytestmark = [pytest.mark.process, pytest.mark.pair, pytest.mark.slow]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Serve the embedded pair."""
    if not any(map(shutil.which, ("aiperf", "lm_eval", "litellm"))):
        pytest.skip("neither aiperf nor lm_eval nor litellm is installed")
    with starting(tmp_path_factory.mktemp("tools")) as starter:
        trio = start_trio(starter, "smollm2", "smollm2")
        gateway = starter("gateway", "--orchestrator", trio.orchestrator.address)
        address = f"http://{gateway.address}"
        assert becomes_true(lambda: httpx.get(f"{address}/health").status_code == 200)
        yield address


def run(tool: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [tool, *arguments], env=kept | environment, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_aiperf_prints_its_speculation_report(url: str, tmp_path: Path) -> None:
    done = run(
        "aiperf", "profile", "--model", "smollm2", "--url", url, "--endpoint-type", "chat",
        "--streaming", "--tokenizer", str(resolve_model("smollm2", "verify")),
        "--request-count", "4", "--concurrency", "2", "--synthetic-input-tokens-mean", "20",
        "--output-tokens-mean", "24", "--ui-type", "simple",
        "--output-artifact-dir", str(tmp_path),
    )  # fmt: skip
    assert "Acceptance Length" in done.stdout
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == 4


def test_lm_eval_scores_log_likelihoods_and_generations(url: str, tmp_path: Path) -> None:
    """Score a small task that a file brings, so that nothing is downloaded."""
    lines = [
        {"question": f"{one} + 1 =", "choices": [f" {one + 1}", " cat"], "answer": 0}
        for one in range(1, 5)
    ]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {data}\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    folder = resolve_model("smollm2", "verify")
    settings = f"model=smollm2,base_url={url}/v1/completions,tokenizer={folder},num_concurrent=2"
    run(
        "lm_eval", "--model", "local-completions", "--model_args", settings, "--tasks", "sums",
        "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
        HF_HOME=str(tmp_path / "hub"),
    )  # fmt: skip
    (report,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(report.read_text())["results"]["sums"]["acc,none"] == 1.0


def test_litellm_completes_and_streams(url: str) -> None:
    tool = shutil.which("litellm")
    if tool is None:
        pytest.skip("litellm is not installed")
    python = Path(tool).with_name("python")
    script = (
        "import sys, litellm\n"
        "asked = dict(model='hosted_vllm/smollm2', api_base=sys.argv[1] + '/v1', api_key='-',\n"
        "    messages=[{'role': 'user', 'content': 'Hi'}], max_tokens=8, temperature=0)\n"
        "whole = litellm.completion(**asked).choices[0].message.content\n"
        "parts = litellm.completion(**asked, stream=True)\n"
        "assert whole == ''.join(one.choices[0].delta.content or '' for one in parts), whole\n"
    )
    run(str(python), "-c", script, url, LITELLM_LOCAL_MODEL_COST_MAP="True")
