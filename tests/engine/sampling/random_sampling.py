"""Random sampling parameters, and the logits that they give by definition, token by token."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from amusd.sampling.parameters import LogprobsOptions, SamplingParameters, SequenceSampling


@st.composite
def parameters(draw: st.DrawFn, vocabulary: int) -> SamplingParameters:
    """Return parameters of which some are set; token ids are below ``vocabulary``."""
    tokens = st.integers(0, vocabulary - 1)
    words = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)  # so that some match
    biases = st.dictionaries(tokens, st.floats(-5, 5, width=32), max_size=6)
    choices: dict[str, Any] = {
        "temperature": st.sampled_from([0.01, 0.7, 1.0, 1.5, 100.0]),
        "top_k": st.integers(1, vocabulary + 2),
        "top_p": st.floats(0.1, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "repetition_penalty": st.sampled_from([0.8, 1.3, 2.0]),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "no_repeat_ngram_size": st.integers(1, 4),
        "logit_bias": biases.map(lambda found: tuple(sorted(found.items()))),
        "allowed_token_ids": st.lists(tokens, min_size=vocabulary // 2, unique=True).map(tuple),
        "bad_words": st.lists(words, max_size=6).map(tuple),
    }
    names = draw(st.lists(st.sampled_from(sorted(choices)), unique=True, max_size=6))
    return SamplingParameters(
        seed=draw(st.integers(0, 2**64 - 1)), **{name: draw(choices[name]) for name in names}
    )


@st.composite
def samplings(draw: st.DrawFn, vocabulary: int, num_prompt_tokens: int) -> SequenceSampling:
    """Return a sampling of a sequence with a prompt of ``num_prompt_tokens``."""
    logprobs = st.builds(LogprobsOptions, num_top=st.integers(0, 5), is_processed=st.booleans())
    return SequenceSampling(
        draw(parameters(vocabulary)),
        num_prompt_tokens,
        num_prompt_tokens + draw(st.integers(0, 6)),
        tuple(draw(st.lists(st.integers(0, vocabulary - 1), max_size=2))),
        draw(st.none() | logprobs),
    )


def processed(
    logits: npt.NDArray[np.float32], text: Sequence[int], sampling: SequenceSampling
) -> npt.NDArray[np.float32]:
    """Return the logits [vocabulary] behind ``text`` after penalties, biases and bans."""
    found = logits.copy()
    asked, start = sampling.parameters, sampling.num_prompt_tokens
    if len(text) < start:
        return found
    output = list(text[start:])
    bias = dict(asked.logit_bias)
    penalty = np.float32(asked.repetition_penalty)
    for token in range(len(found)):
        if token in text:
            found[token] = found[token] / penalty if found[token] > 0 else found[token] * penalty
        count = output.count(token)
        added = asked.frequency_penalty * count + (asked.presence_penalty if count else 0.0)
        found[token] += np.float32(bias.get(token, 0.0) - added)
        if _is_banned([*text, token], len(output) + 1, sampling):
            found[token] = -math.inf
    return found


def _is_banned(text: list[int], num_output: int, sampling: SequenceSampling) -> bool:
    """Whether the last token of a text may not stand there."""
    asked, token = sampling.parameters, text[-1]
    if asked.allowed_token_ids and token not in asked.allowed_token_ids:
        return True
    if len(text) - 1 < sampling.min_position and token in sampling.banned_token_ids:
        return True
    output = text[len(text) - num_output :]
    if any(output[-len(word) :] == list(word) for word in asked.bad_words):
        return True
    size = asked.no_repeat_ngram_size
    ngrams = [text[at : at + size] for at in range(len(text) - size)] if size else []
    return text[-size:] in ngrams
