// The page: takes a request, runs it with each strategy, and shows both lanes as they grow.

import {decode} from "./event_stream.js";
import {RunState} from "./run_state.js";

const byId = (id) => document.getElementById(id);
const NAMES = {autoregressive: "Plain decoding", speculative: "Speculative", amusd: "AMUSD"};
const PLAIN = "autoregressive";

let running = null; // the AbortController of the request that runs
let plainSpeed = null; // tokens per second of plain decoding with the same request

/** Shows one run. Changes are drawn once a frame. */
class RunView {
  constructor(strategy) {
    const part = byId("run").content.cloneNode(true);
    this.article = part.querySelector("article");
    this.article.dataset.strategy = strategy;
    this.article.querySelector("h2").textContent = NAMES[strategy];
    this.strategy = strategy;
    this.lanes = {draft: part.querySelector(".draft"), verify: part.querySelector(".verify")};
    this.note = part.querySelector(".note");
    this.elements = new Map();
    this.changed = new Set();
    this.state = new RunState((token) => this._change(token));
    byId("runs").append(part);
    if (strategy === PLAIN) {
      this.lanes.draft.previousElementSibling.hidden = true;
      this.lanes.draft.hidden = true;
    }
  }

  take(event) {
    this.state.take(event);
    this._drawSoon();
  }

  end() {
    this._draw();
    const {counts, finishReason} = this.state;
    const parts = [`${this.state.final.length} tokens in ${counts.passes} passes`];
    if (this.strategy !== PLAIN) {
      parts.push(`${counts.accepted} accepted, ${counts.rejected} rejected, ` +
        `${counts.wasted} thrown away`);
    }
    if (counts.branchStarts) parts.push(`${counts.branchStarts} epochs began with a branch`);
    if (finishReason) parts.push(`ended by ${finishReason}`);
    this.note.textContent = parts.join("; ");
  }

  _change(token) {
    this.changed.add(token);
  }

  _drawSoon() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => this._draw());
  }

  _draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    for (const token of this.changed) this._drawToken(token);
    this.changed.clear();
    for (const lane of Object.values(this.lanes)) lane.scrollTop = lane.scrollHeight;
    this._drawCounters();
  }

  _drawToken(token) {
    let element = this.elements.get(token);
    if (!element) {
      element = document.createElement("span");
      element.textContent = token.text.replaceAll("\n", "⏎") || "␀";
      this.elements.set(token, element);
      this.lanes[token.lane].append(element);
      if (token.text.includes("\n")) this.lanes[token.lane].append(document.createElement("br"));
    }
    element.className = `token ${token.source} ${token.state}`;
    element.title = `position ${token.position}, token ${token.id}: ${token.state}`;
  }

  _drawCounters() {
    const {state} = this;
    const speed = state.tokensPerSecond;
    if (this.strategy === PLAIN) plainSpeed = speed;
    const isDrafted = this.strategy !== PLAIN;
    this._count("speed", speed?.toFixed(1));
    this._count("ratio", speed && plainSpeed ? `${(speed / plainSpeed).toFixed(2)}×` : null);
    this._count("acceptance", isDrafted ? percent(state.acceptance) : null);
    this._count("perPass", state.tokensPerPass?.toFixed(2));
    this._count("draftIdle", isDrafted ? percent(state.idle("draft")) : null);
    this._count("verifyIdle", percent(state.idle("verify")));
  }

  _count(name, text) {
    this.article.querySelector(`[data-counter="${name}"]`).textContent = text ?? "–";
  }
}

function percent(share) {
  return share === null ? null : `${Math.round(100 * share)} %`;
}

function say(text, isFailed = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("failed", isFailed);
}

function requested() {
  const temperature = byId("temperature").valueAsNumber;
  const text = byId("prompt").value;
  return {
    ...(byId("is-chat").checked ? {messages: [{role: "user", content: text}]} : {prompt: text}),
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature,
    ...(temperature > 0 ? {seed: byId("seed").valueAsNumber} : {}),
  };
}

async function start(event) {
  event?.preventDefault();
  if (running || !byId("request").reportValidity()) return;
  const boxes = [...document.querySelectorAll('[name="strategy"]:checked')];
  if (!boxes.length) return say("Choose at least one strategy.", true);
  byId("runs").replaceChildren();
  plainSpeed = null;
  running = new AbortController();
  setRunning(true);
  try {
    for (const box of boxes) await runOne(box.value, requested(), running.signal);
    say("Done.");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(`It failed: ${error.message}`, true);
  } finally {
    running = null;
    setRunning(false);
  }
}

async function runOne(strategy, request, signal) {
  say(`${NAMES[strategy]} …`);
  const view = new RunView(strategy);
  try {
    for await (const event of decode({...request, strategy}, signal)) {
      if (event.error) throw new Error(event.error.message);
      view.take(event);
    }
  } finally {
    view.end();
  }
}

function setRunning(isRunning) {
  byId("start").disabled = isRunning;
  byId("stop").disabled = !isRunning;
}

function named({name, num_parameters}) {
  const millions = Math.round(num_parameters / 1e6);
  return millions ? `${name} (${millions} M parameters)` : name;
}

async function showServer() {
  const response = await fetch("server").catch(() => null);
  if (!response?.ok) return;
  const server = await response.json();
  const draft = server.draft_model ? `${named(server.draft_model)} drafts` : "no draft model";
  byId("models").textContent = `${named(server.verify_model)} verifies, ${draft}.`;
  for (const box of document.querySelectorAll('[name="strategy"]')) {
    box.disabled = !server.strategies.includes(box.value);
    box.checked &&= !box.disabled;
  }
}

byId("request").addEventListener("submit", start);
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) start(event);
  if (event.key === "Escape") running?.abort();
});
showServer();
