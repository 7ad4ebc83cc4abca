"""The page in a real browser, before real services: what it shows is what was decoded."""

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from tests.process.services import Service, Starter, Trio, becomes_true

playwright = pytest.importorskip("playwright.sync_api", reason="not installed: make setup")
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def url(start_for_all: Starter, trio: Trio) -> str:
    gateway: Service = start_for_all("gateway", "--orchestrator", trio.orchestrator.address)
    found = f"http://{gateway.address}"
    assert becomes_true(lambda: httpx.get(f"{found}/health").status_code == 200)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


def is_problem(message: Any) -> bool:
    """Whether the browser reports an error; one of a refused request is none."""
    return bool(message.type == "error" and "status of 400" not in message.text)


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    made = context.new_page()
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda one: problems.extend([one.text] * is_problem(one)))
    made.goto(url)
    yield made
    context.close()
    assert not problems


def decode(page: Any, text: str, num_tokens: int) -> None:
    """Ask with the keyboard."""
    page.locator("#is-chat").uncheck()
    page.fill("#max-tokens", str(num_tokens))
    page.fill("#prompt", text)
    page.keyboard.press("Control+Enter")


def ends_with(page: Any, words: str) -> None:
    playwright.expect(page.locator("#status")).to_have_text(re.compile(words), timeout=20_000)


def titles(page: Any, strategy: str, lane: str) -> list[str]:
    tokens = page.locator(f'[data-strategy="{strategy}"] .lane.{lane} .token')
    found: list[str] = tokens.evaluate_all("all => all.map((one) => one.title)")
    return found


def test_lanes_show_what_was_decoded(page: Any, client: Client) -> None:
    decode(page, "Hello", 40)
    ends_with(page, "Done")
    tokens = client.generate(Prompt(text="Hello"), Options(max_tokens=40)).wait().tokens
    for strategy in ("autoregressive", "amusd"):
        final = titles(page, strategy, "verify")
        assert [int(one.split("token ")[1].split(":")[0]) for one in final] == tokens
    drafted = [one.rsplit(": ", 1)[1] for one in titles(page, "amusd", "draft")]
    assert {"accepted", "rejected", "wasted"} >= set(drafted)  # nothing is left undecided
    num_accepted = sum("accepted" in one for one in titles(page, "amusd", "verify"))
    assert drafted.count("accepted") == num_accepted > 0
    note = page.locator('[data-strategy="amusd"] .note').inner_text()
    assert note.startswith("40 tokens in ")
    assert f"{num_accepted} accepted" in note
    speed = page.locator('[data-strategy="amusd"] [data-counter="ratio"]').inner_text()
    assert re.fullmatch(r"\d+\.\d\d×", speed)


def test_a_phone_shows_everything_without_scrolling_sideways(page: Any) -> None:
    decode(page, "Hello", 30)
    ends_with(page, "Done")
    wide = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
            .filter((one) => one.getBoundingClientRect().right > innerWidth)
            .map((one) => one.className || one.tagName)"""
    )
    assert not wide
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_escape_stops_a_run(page: Any) -> None:
    decode(page, "Hello", 500)
    playwright.expect(page.locator(".verify .token").first).to_be_visible()
    page.keyboard.press("Escape")
    ends_with(page, "Stopped")
    assert page.locator("#start").is_enabled()


def test_a_refusal_is_shown_in_the_servers_words(page: Any) -> None:
    page.evaluate("document.getElementById('request').noValidate = true")
    decode(page, "x" * 700, 10)
    ends_with(page, "It failed: .*context")


def test_nothing_is_loaded_from_elsewhere(url: str) -> None:
    answer = httpx.get(url)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", answer.text)


def test_states_follow_from_the_events(page: Any) -> None:
    state = page.evaluate(
        """async () => {
            const {RunState} = await import("/run_state.js");
            const state = new RunState();
            const token = (id) => ({id, text: `<img src=x onerror=${id}>`});
            state.take({event: "proposal", epoch: 0, position: 4, source: "lookup",
                tokens: [token(1), token(2), token(3)], device_seconds: 0.5, seconds: 1,
                branches: [{position: 5, token: token(9), tokens: [token(8)]}]});
            state.take({event: "verdict", epoch: 0, position: 4, num_accepted: 1,
                next: token(9), device_seconds: 1, seconds: 2});
            state.take({event: "proposal", epoch: 0, position: 7, source: "model",
                tokens: [token(7)], seconds: 2.5});
            state.take({event: "verdict", epoch: 1, position: 6, num_accepted: 1,
                next: token(6), device_seconds: 1, seconds: 3});
            state.take({event: "end", finish_reason: "stop", seconds: 4});
            return JSON.stringify({drafted: state.drafted.map((one) => one.state),
                sources: state.drafted.map((one) => one.source),
                final: state.final.map((one) => one.id), counts: state.counts,
                acceptance: state.acceptance, idle: state.idle("verify"),
                speed: state.tokensPerSecond});
        }"""
    )
    assert json.loads(state) == {
        "drafted": ["accepted", "rejected", "wasted", "accepted", "wasted"],
        "sources": ["lookup", "lookup", "lookup", "branch", "model"],
        "final": [1, 9, 8, 6],
        "counts": {
            "accepted": 2, "rejected": 1, "wasted": 2, "passes": 2, "branches": 1,
            "branchStarts": 1,
        },
        "acceptance": 2 / 3,
        "idle": 0.5,
        "speed": 1.0,
    }  # fmt: skip
