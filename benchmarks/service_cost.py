"""What the services cost: autoregressive decoding through them against the engine in a loop.

Run it on an idle machine: ``python benchmarks/service_cost.py --output cost.json``.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from amusd.cli import reporting_errors
from amusd.cli.local_services import LocalSettings, local_services, place
from amusd.cli.measure import Sample, ServiceRunner, measure, reference_of
from amusd.cli.tables import show
from amusd.client import Client
from amusd.engine.interface import Engine, EngineOptions
from amusd.engine.loading.device import DeviceSettings
from amusd.engine.loading.model_loading import load_model
from amusd.engine.reference import decode_autoregressive
from amusd.prompts import Prompt
from amusd.protocol.strategy import Strategy


@dataclass(frozen=True, slots=True)
class LoopRunner:
    """Decodes with the engine in a loop in this process."""

    engine: Engine
    name: str = "engine-loop"

    def run(self, prompt: Prompt, max_tokens: int) -> Sample:
        """Decode one prompt."""
        started = time.perf_counter()
        tokens = decode_autoregressive(self.engine, list(prompt.tokens), max_tokens)
        return Sample(tuple(tokens), time.perf_counter() - started)


def main(
    model: Annotated[str, typer.Option(help="Verify model.")] = "smollm2",
    max_tokens: Annotated[int, typer.Option(help="Tokens of each output.")] = 128,
    num_prompts: Annotated[int, typer.Option(help="Outputs of the services and of the loop.")] = 8,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure both interleaved, on the same core, and print the ratio of each pair."""
    # The verify model runs on the cores that it has beside a draft, although no draft runs here.
    _, where = place(LocalSettings(verify=model))
    options = EngineOptions(reuse_prefixes=False)
    settings = LocalSettings(draft="", verify=model, verify_options=options)
    starts = range(10, 10 + num_prompts)
    prompts = [Prompt(tokens=tuple(range(start, start + 20))) for start in starts]
    with local_services(settings) as services, Client(services.address) as client:
        device = DeviceSettings(where.device, "auto", where.threads, where.cpus)
        loop = LoopRunner(load_model(model, "verify", device))
        strategy = Strategy.AUTOREGRESSIVE
        served = ServiceRunner(client, strategy.value, strategy, ignore_eos=True)
        measurements = measure([loop, served], prompts, max_tokens)
    show(measurements, f"autoregressive decoding, {num_prompts} outputs of {max_tokens} tokens")
    pairs = zip(measurements[1].samples, measurements[0].samples, strict=True)
    ratios = [served.ms_per_token / looped.ms_per_token for served, looped in pairs]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(
        f"through the services / in a loop: median {median:.3f}, quartiles {low:.3f} to {high:.3f}"
    )
    if output is not None:
        reference = reference_of(measurements)
        report = {
            "ratios": ratios,
            "ratio_quartiles": [low, median, high],
            "runs": [measurement.report(reference) for measurement in measurements],
        }
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
