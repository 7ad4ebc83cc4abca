"""Measurements: strategies by name, interleaving, and figures."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from amusd.analysis.generation_statistics import PositionAcceptance, SourceAcceptance, Statistics
from amusd.cli.measure import (
    WARM_UP_TOKENS,
    Measurement,
    Sample,
    measure,
    parse_strategies,
    reference_of,
)
from amusd.cli.tables import shares
from amusd.prompts import Prompt
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy


@dataclass
class Replay:
    """A runner that answers every prompt with the same tokens."""

    name: str
    tokens: tuple[int, ...] = (1, 2)
    seconds: float = 1.0
    statistics: Statistics | None = None
    log: list[tuple[str, str, int]] = field(default_factory=list)

    def run(self, prompt: Prompt, max_tokens: int) -> Sample:
        self.log.append((self.name, prompt.text, max_tokens))
        return Sample(self.tokens, self.seconds, self.statistics)


def statistics(**values: Any) -> Statistics:
    zeros: dict[str, Any] = dict.fromkeys(
        ("num_prompt_tokens", "num_output_tokens", "num_passes", "num_drafted", "num_accepted",
         "num_rejected", "num_wasted", "num_rollbacks"), 0,
    )  # fmt: skip
    times = {"wall_seconds": 1.0, "time_to_first_token_seconds": 0.1}
    busy = {"draft_busy_seconds": 0.5, "verify_busy_seconds": 0.8}
    rest = {"acceptance_per_position": (), "fallback_reason": ""}
    return Statistics(**(zeros | times | busy | rest | values))


def test_strategies_are_read_with_their_lookahead() -> None:
    runners = parse_strategies(" AMUSD, speculative:3,,autoregressive ")
    assert [(one.name, one.strategy, one.lookahead) for one in runners] == [
        ("amusd", Strategy.AMUSD, None),
        ("speculative:3", Strategy.SPECULATIVE, 3),
        ("autoregressive", Strategy.AUTOREGRESSIVE, None),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("psychic", "use autoregressive, speculative, amusd"),
        ("amusd:", "not a number"),
        ("amusd:0", "not a number of 1"),
        ("amusd:-1", "not a number"),
        ("amusd:two", "not a number"),
        (" , ", "name at least one"),
    ],
)
def test_a_bad_strategy_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        parse_strategies(text)


def test_runners_are_interleaved_after_a_warm_up_of_each() -> None:
    log: list[tuple[str, str, int]] = []
    one, other = Replay("one", log=log), Replay("other", log=log)
    reported: list[None] = []
    measured = measure(
        [one, other], [Prompt(text="p"), Prompt(text="q")], 50, lambda: reported.append(None)
    )
    assert log == [
        ("one", "p", WARM_UP_TOKENS),
        ("other", "p", WARM_UP_TOKENS),
        ("one", "p", 50),
        ("other", "p", 50),
        ("other", "q", 50),
        ("one", "q", 50),
    ]
    assert [len(one.samples) for one in measured] == [2, 2]
    assert len(reported) == 4


def test_figures_are_sums_over_all_samples() -> None:
    positions = (PositionAcceptance(3, 2), PositionAcceptance(2, 1))
    found = statistics(
        num_passes=4, num_accepted=3, num_rejected=1, num_rollbacks=1,
        acceptance_per_position=positions,
    )  # fmt: skip
    plain = Measurement(Replay("autoregressive"), [Sample((1, 2, 3, 4), 2.0, None)])
    fast = Measurement(Replay("amusd"), [Sample((1, 2), 0.2, found), Sample((3, 4), 0.3, found)])
    figures = fast.report(plain)
    assert figures["tokens"] == 4
    assert figures["ms_per_token"] == pytest.approx(125)
    assert figures["speedup"] == pytest.approx(4)
    assert figures["acceptance_rate"] == pytest.approx(0.75)
    assert figures["tokens_per_pass"] == pytest.approx(0.5)
    assert figures["rollbacks"] == 2
    assert figures["acceptance_per_position"] == [
        {"checked": 6, "accepted": 4},
        {"checked": 4, "accepted": 2},
    ]
    assert figures["outputs_identical"] is False


def test_one_different_token_makes_outputs_differ() -> None:
    one = Measurement(Replay("one"), [Sample((1, 2), 1.0), Sample((3,), 1.0)])
    same = Measurement(Replay("same"), [Sample((1, 2), 2.0), Sample((3,), 2.0)])
    other = Measurement(Replay("other"), [Sample((1, 2), 1.0), Sample((4,), 1.0)])
    assert same.report(one)["outputs_identical"] is True
    assert other.report(one)["outputs_identical"] is False


def test_autoregressive_decoding_is_the_reference_at_any_index() -> None:
    plain, fast = Measurement(Replay("autoregressive")), Measurement(Replay("amusd"))
    assert reference_of([fast, plain]) is plain
    assert reference_of([fast]) is fast


def test_sources_are_summed_over_all_samples() -> None:
    model, looked_up = DraftSource.MODEL, DraftSource.LOOKUP
    one = statistics(num_passes=1, acceptance_per_source=(SourceAcceptance(model, 9, 4, 2),))
    other = statistics(
        num_passes=1,
        acceptance_per_source=(
            SourceAcceptance(model, 3, 1, 1),
            SourceAcceptance(looked_up, 5, 5, 4),
        ),
    )
    found = Measurement(Replay("amusd"), [Sample((1,), 1.0, it) for it in (one, other)])
    assert found.report(found)["acceptance_per_source"] == {
        "model": {"drafted": 12, "checked": 5, "accepted": 3},
        "lookup": {"drafted": 5, "checked": 5, "accepted": 4},
    }
    assert shares(found.acceptance_per_source()) == "model 60%, lookup 80%"


def test_shares_are_shown_only_for_several_sources() -> None:
    compared = SourceAcceptance(DraftSource.MODEL, 9, 4, 2)
    never_compared = SourceAcceptance(DraftSource.LOOKUP, 2)
    assert shares((compared,)) == shares((compared, never_compared)) == shares(()) == ""
