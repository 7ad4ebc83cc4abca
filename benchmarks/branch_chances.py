"""What branches of a draft model can give: ``python -m benchmarks.branch_chances``.

Three tables: how often the verify model's token is among the draft's next-best ones where its first
one is rejected, how long a draft step takes by its rows, and what the next-best tokens cost.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from transformers import AutoTokenizer

from amusd.cli import reporting_errors
from amusd.cli.local_services import LocalSettings, place
from amusd.engine.interface import MAX_ALTERNATIVES, Engine, EngineOptions, ScheduledSequence
from amusd.engine.loading.device import DeviceSettings
from amusd.engine.loading.model_loading import load_model, locate_model
from amusd.engine.reference import decode_autoregressive
from amusd.prompts import encode, load_prompts
from amusd.protocol.errors import AmusdError
from benchmarks.rounds import Times, ratio, time_interleaved

_CONTEXT = 128
_ROWS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class Drafted:
    """What a draft predicts at one token of the verify model.

    ``rank`` is the place of the verify model's token among the draft's, from 0; None: it is not
    among them. ``probability`` is the draft's own, of its first token.
    """

    rank: int | None
    probability: float


def drafted(draft: Engine, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Drafted]:
    """Yield what ``draft`` predicts at each token of ``answer``, which it is told one by one."""
    slot = draft.open(len(prompt) + len(answer))
    try:
        pending = list(prompt)
        for token in answer:
            [outcome] = draft.run([ScheduledSequence(slot, pending, 1)])
            if isinstance(outcome, AmusdError):
                raise outcome
            ranked = [*outcome, *draft.alternatives(slot)]
            rank = ranked.index(token) if token in ranked else None
            yield Drafted(rank, draft.probabilities(slot)[0])
            pending = [token]
    finally:
        draft.close(slot)


@dataclass(frozen=True, slots=True)
class Chances:
    """How often the draft is right at first, and where not, how often with one of the next-best."""

    num_tokens: int
    acceptance: float
    among_next: tuple[float, ...]
    """Share of the rejections where the token is among the first 1, 2, ... next-best ones."""


def chances(found: Iterable[Drafted]) -> Chances:
    """Return the chances over all tokens."""
    ranks = Counter(one.rank for one in found)
    num_tokens = ranks.total()
    num_rejected = num_tokens - ranks[0]
    within = [sum(ranks[rank] for rank in range(1, most + 1)) for most in range(1, 5)]
    return Chances(
        num_tokens,
        ranks[0] / max(1, num_tokens),
        tuple(count / max(1, num_rejected) for count in within),
    )


def steps(engine: Engine, rows: int) -> Callable[[], object]:
    """Return a repeatable batch of ``rows`` sequences with one token each."""
    slots = [engine.open(_CONTEXT + 8) for _ in range(rows)]
    size = engine.description.output_size
    text = [token % size for token in range(10, 10 + _CONTEXT)]
    for slot in slots:
        engine.run([ScheduledSequence(slot, text, 1)])
    batch = [ScheduledSequence(slot, [20 + row], 1) for row, slot in enumerate(slots)]

    def run() -> None:
        engine.run(batch)
        for slot in slots:
            engine.alternatives(slot)
            engine.truncate(slot, _CONTEXT)

    return run


def main(
    draft: Annotated[str, typer.Option(help="Draft model.")] = "smollm2",
    verify: Annotated[str, typer.Option(help="Verify model.")] = "smollm2",
    prompts: Annotated[str, typer.Option(help="humaneval, or a JSONL file.")] = "humaneval",
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts.")] = 10,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 96,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of the timed steps.")] = 200,
) -> None:
    """Measure and print the tables."""
    _, where = place(LocalSettings(draft=draft, verify=verify))
    device = DeviceSettings("cpu", "auto", 1, where.cpus[:1])
    options = EngineOptions(max_batch=8, cache_mib=256, reuse_prefixes=False)
    ranking = EngineOptions(
        max_batch=8, cache_mib=256, reuse_prefixes=False, num_alternatives=MAX_ALTERNATIVES
    )
    drafts = load_model(draft, "draft", device, ranking)
    engine = load_model(verify, "verify", device, options)
    tokenizer = AutoTokenizer.from_pretrained(locate_model(verify, "verify"))
    texts = [encode(prompt, tokenizer) for prompt in load_prompts(prompts, limit)]
    print(f"{prompts}:")
    _print_chances(list(_all_drafted(drafts, engine, texts, max_tokens)))
    plain = load_model(draft, "draft", device, options)
    _print_steps(time_interleaved({str(rows): steps(drafts, rows) for rows in _ROWS}, rounds))
    _print_cost(
        time_interleaved(
            {
                f"{name} {rows}": steps(engine, rows)
                for rows in (1, 8)
                for name, engine in (("plain", plain), ("ranked", drafts))
            },
            rounds,
        )
    )


def _all_drafted(
    draft: Engine, engine: Engine, texts: Sequence[list[int]], max_tokens: int
) -> Iterator[Drafted]:
    """Yield what ``draft`` predicts at each token of the answers of ``engine``."""
    ends = set(engine.description.eos_token_ids)
    for tokens in texts:
        answer = decode_autoregressive(engine, tokens, max_tokens)
        end = next((i for i, token in enumerate(answer, 1) if token in ends), len(answer))
        yield from drafted(draft, tokens, answer[:end])


def _print_chances(found: list[Drafted]) -> None:
    all_of_them = chances(found)
    print(f"  {all_of_them.num_tokens} tokens, acceptance {all_of_them.acceptance:.0%}")
    for most, share in enumerate(all_of_them.among_next, 1):
        print(f"  a rejection's token is among the next-best {most}: {share:.0%}")
    found.sort(key=lambda one: one.probability)
    for part in range(4):
        some = found[len(found) * part // 4 : len(found) * (part + 1) // 4]
        own = statistics.mean(one.probability for one in some)
        right = statistics.mean(one.rank == 0 for one in some)
        print(f"  quarter {part + 1} by the draft's own probability: {own:.2f}, right {right:.2f}")


def _print_steps(times: dict[str, Times]) -> None:
    for name, found in times.items():
        grows = ratio(found, times["1"])[0]
        print(f"a step of {name} rows: {1e3 * found.median:.2f} ms, {grows:.2f} of one row")


def _print_cost(times: dict[str, Times]) -> None:
    for rows in ("1", "8"):
        cost, low, high = ratio(times[f"ranked {rows}"], times[f"plain {rows}"])
        print(f"next-best tokens, {rows} rows: {cost:.3f} of a step ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
