"""Reference decoding in one process. The services must give the same tokens."""

from amusd.engine.interface import Engine, ScheduledSequence
from amusd.protocol.errors import AmusdError
from amusd.sampling.parameters import GREEDY, SequenceSampling


def decode_autoregressive(
    engine: Engine, prompt: list[int], num_tokens: int, sampling: SequenceSampling = GREEDY
) -> list[int]:
    """Return ``num_tokens`` tokens after ``prompt``, one token a batch."""
    slot = engine.open(len(prompt) + num_tokens, sampling)
    try:
        output: list[int] = []
        pending = prompt
        while len(output) < num_tokens:
            output += _run(engine, slot, pending, num_outputs=1)
            pending = output[-1:]
        return output
    finally:
        engine.close(slot)


def decode_speculative(
    draft: Engine,
    verify: Engine,
    prompt: list[int],
    num_tokens: int,
    lookahead: int,
    sampling: SequenceSampling = GREEDY,
) -> list[int]:
    """Return the same tokens by speculative decoding: draft ``lookahead`` tokens, then verify.

    Leviathan et al., arXiv 2211.17192, algorithm 1, with a token of the verify model in place of
    its rule of acceptance.
    """
    capacity = len(prompt) + num_tokens + lookahead + 1
    draft_slot, verify_slot = draft.open(capacity, sampling), verify.open(capacity, sampling)
    try:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + num_tokens:
            proposed: list[int] = []
            for _ in range(lookahead):
                pending = [*tokens, *proposed][draft.length(draft_slot) :]
                proposed += _run(draft, draft_slot, pending, num_outputs=1)
            pending = [*tokens[verify.length(verify_slot) :], *proposed]
            predicted = _run(verify, verify_slot, pending, num_outputs=lookahead + 1)
            num_accepted = 0
            most = len(predicted) - 1
            while num_accepted < most and proposed[num_accepted] == predicted[num_accepted]:
                num_accepted += 1
            tokens += predicted[: num_accepted + 1]
            verify.truncate(verify_slot, len(tokens) - 1)
            draft.truncate(draft_slot, min(draft.length(draft_slot), len(tokens) - 1))
        return tokens[len(prompt) :][:num_tokens]
    finally:
        draft.close(draft_slot)
        verify.close(verify_slot)


def _run(engine: Engine, slot: int, tokens: list[int], num_outputs: int) -> list[int]:
    """Run one sequence; return its sampled tokens, [num_outputs] or fewer."""
    [outcome] = engine.run([ScheduledSequence(slot, tokens, num_outputs)])
    if isinstance(outcome, AmusdError):
        raise outcome
    return outcome
