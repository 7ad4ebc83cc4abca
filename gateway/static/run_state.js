// What a run shows, from the events of its generation. No page, no network: see decode_page.js.
//
// Rules
// - A drafted token is proposed, then accepted, rejected or wasted; it never changes back.
// - A token in the verify lane is final.
// - The verify model's token ends an epoch if the draft has another one at its position. What the
//   draft proposed behind it, and what still arrives of that epoch, is wasted.

/** Keeps the tokens of both lanes, and the counters. `changed` gets each token that changes. */
export class RunState {
  constructor(changed = () => {}) {
    this.drafted = [];
    this.final = [];
    this.epoch = 0;
    this.seconds = 0;
    this.counts = {accepted: 0, rejected: 0, wasted: 0, passes: 0, branches: 0, branchStarts: 0};
    this.busy = {draft: 0, verify: 0};
    this.statistics = null;
    this.finishReason = "";
    this._changed = changed;
    this._tail = new Map(); // drafted tokens of the epoch that are not decided, by position
    this._branches = new Map(); // by position and token
    this._firstSeconds = null;
    this._firstTokens = 0;
  }

  /** Takes one event. */
  take(event) {
    this.seconds = Math.max(this.seconds, event.seconds ?? 0);
    switch (event.event) {
      case "proposal": return this._proposal(event);
      case "verdict": return this._verdict(event);
      case "rollback": return this._rollback(event);
      case "end": return this._end(event);
    }
  }

  /** Output tokens per second after the first ones; null: not known yet. */
  get tokensPerSecond() {
    const count = this.final.length - this._firstTokens;
    const seconds = this.seconds - this._firstSeconds;
    return this._firstSeconds === null || count <= 0 || seconds <= 0 ? null : count / seconds;
  }

  /** The share of compared tokens that were right; null: none was compared. */
  get acceptance() {
    const compared = this.counts.accepted + this.counts.rejected;
    return compared ? this.counts.accepted / compared : null;
  }

  get tokensPerPass() {
    return this.counts.passes ? this.final.length / this.counts.passes : null;
  }

  /** The share of the time in which a device did not work for this run. */
  idle(device) {
    return this.seconds ? Math.max(0, 1 - this.busy[device] / this.seconds) : null;
  }

  _proposal({epoch, position, tokens, source, branches = [], device_seconds = 0}) {
    this.busy.draft += device_seconds;
    tokens.forEach((token, index) => {
      const known = this._tail.get(position + index);
      if (epoch === this.epoch && known) return; // a branch has it already
      const isLate = epoch < this.epoch || position + index < this._verified;
      this._draft(position + index, token, source, isLate ? "wasted" : "proposed");
    });
    for (const branch of branches) {
      const key = `${branch.position}:${branch.token.id}`;
      if (!this._branches.has(key)) this.counts.branches += 1;
      this._branches.set(key, branch.tokens);
    }
  }

  _verdict({position, num_accepted, next, pass_seconds = 0, device_seconds = pass_seconds}) {
    this.busy.verify += device_seconds;
    this.counts.passes += 1;
    for (let index = 0; index < num_accepted; index++) this._accept(position + index);
    const at = position + num_accepted;
    const drafted = this._tail.get(at);
    if (drafted && drafted.id === next.id) {
      this._accept(at);
    } else {
      this._finish(at, next, drafted ? "own corrected" : "own");
      if (drafted) {
        this._decide(drafted, "rejected");
        this._tail.delete(at);
        this._waste();
        this.epoch += 1;
        this._beginWith(at + 1, this._branches.get(`${at}:${next.id}`));
      }
    }
    this._branches.forEach((_, key) => {
      if (Number(key.split(":")[0]) < this._verified) this._branches.delete(key);
    });
    if (this._firstSeconds === null) {
      this._firstSeconds = this.seconds;
      this._firstTokens = this.final.length;
    }
  }

  _rollback({epoch, position, branch = []}) {
    if (epoch > this.epoch) { // for a proposal that came too late
      this._waste();
      this.epoch = epoch;
    }
    this._beginWith(position, branch);
  }

  _end({finish_reason, statistics}) {
    this._waste();
    this.statistics = statistics ?? null;
    this.finishReason = finish_reason ?? "";
  }

  get _verified() {
    return this.final.length ? this.final[this.final.length - 1].position + 1 : 0;
  }

  /** Begins an epoch with the tokens of a branch; those that are known already stay. */
  _beginWith(position, tokens) {
    if (!tokens?.length) return;
    if (!this._tail.size) this.counts.branchStarts += 1;
    tokens.forEach((token, index) => {
      if (!this._tail.has(position + index) && position + index >= this._verified) {
        this._draft(position + index, token, "branch", "proposed");
      }
    });
  }

  _draft(position, {id, text}, source, state) {
    const token = {lane: "draft", position, id, text, source, state};
    this.drafted.push(token);
    if (state === "wasted") this.counts.wasted += 1;
    else this._tail.set(position, token);
    this._changed(token);
  }

  _accept(position) {
    const token = this._tail.get(position);
    if (!token) return;
    this._tail.delete(position);
    this._decide(token, "accepted");
    this._finish(position, token, `accepted ${token.source}`);
  }

  _decide(token, state) {
    token.state = state;
    this.counts[state] += 1;
    this._changed(token);
  }

  _waste() {
    for (const token of this._tail.values()) this._decide(token, "wasted");
    this._tail.clear();
  }

  _finish(position, {id, text}, state) {
    const token = {lane: "verify", position, id, text, source: "", state};
    this.final.push(token);
    this._changed(token);
  }
}
