"""How often drafts are right about a verify model's own text, token by token.

Teacher-forced: a draft sees the verify model's tokens and predicts the next one, which is what it
does in the services where its earlier proposals were right. One pass measures a whole answer.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amusd.distill.files import write_text_whole
from amusd.distill.writer import TextWriter
from amusd.protocol.errors import InvalidInputError

_WRITE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and what the verify model wrote after it."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model; ``head_ids`` [H] are the tokens of a reduced output head."""

    model: PreTrainedModel
    head_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SampledHits:
    """What sampling at one temperature makes of an answer.

    ``coupled`` are hits of samples that share their noise, one row for each draw of it.
    ``overlap`` [n] is the sum of the smaller probabilities, 1 - TV, which no draft with these
    probabilities can surpass.
    """

    coupled: list[list[bool]]
    overlap: list[float]


def write_answers(
    writer: TextWriter, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float
) -> list[Answer]:
    """Let the verify model answer ``prompts``; those of like length share a batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for first in range(0, len(order), _WRITE_ROWS):
        group = order[first : first + _WRITE_ROWS]
        rows = [prompts[i] for i in group]
        warmth = [temperature] * len(group)
        for i, row in zip(
            group, writer.write(rows, warmth, max_tokens, first, to_the_end=True), strict=True
        ):
            answers[i] = Answer(tuple(row.prompt), tuple(row.tokens))
    return [answers[i] for i in range(len(prompts))]


def save_answers(path: Path, answers: Sequence[Answer], origin: str) -> None:
    """Write answers as JSON lines; ``origin`` says what they were made with.

    Raises:
        UnavailableError: the disk does not take them.
    """
    lines = [json.dumps({"origin": origin}), *(json.dumps(asdict(answer)) for answer in answers)]
    text = "\n".join(lines) + "\n"
    write_text_whole(path, text)


def load_answers(path: Path, origin: str) -> list[Answer]:
    """Read answers again.

    Raises:
        InvalidInputError: they were made with something else, or a line is bad.
    """
    answers: list[Answer] = []
    found = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            if number == 1:
                found = record["origin"]
            else:
                answers.append(Answer(tuple(record["prompt"]), tuple(record["tokens"])))
        except (ValueError, KeyError, TypeError):
            raise InvalidInputError(
                f"{path}, line {number}: not an answer; delete the file to write it again"
            ) from None
    if found != origin:
        raise InvalidInputError(
            f"{path} has answers to other prompts, or of another verify model: choose another file"
        )
    return answers


@torch.inference_mode()
def greedy_hits(draft: Model, answer: Answer) -> list[bool]:
    """Return at which positions of ``answer`` the draft's greedy token is the answer's."""
    rows = _logits(draft, answer).argmax(-1)
    tokens = rows if draft.head_ids is None else draft.head_ids[rows]
    right: list[bool] = (tokens.cpu() == torch.tensor(answer.tokens)).tolist()
    return right


@torch.inference_mode()
def sampled_hits(
    draft: Model, verify: Model, answer: Answer, temperature: float, draws: int, seed: int
) -> SampledHits:
    """Return how often draft and verify model sample the same token.

    Coupled: both add the same Gumbel noise to their logits over the temperature and take the
    argmax (Daliri et al., arXiv 2408.07978). ``draws`` is the number of noises tried.
    """
    p_logits = _logits(verify, answer).float() / temperature  # [n, V]
    q_logits = _logits(draft, answer).float().to(p_logits.device) / temperature  # [n, H]
    ids = torch.arange(p_logits.shape[1], device=p_logits.device)
    if draft.head_ids is not None:
        ids = draft.head_ids.to(p_logits.device)
    q_logits = q_logits[:, : len(ids)]
    noise = torch.Generator(p_logits.device).manual_seed(seed)
    coupled = []
    for _ in range(draws):
        gumbel = -torch.empty_like(p_logits).exponential_(generator=noise).log()
        ours = (p_logits + gumbel).argmax(-1)
        theirs = ids[(q_logits + gumbel[:, ids]).argmax(-1)]
        coupled.append((ours == theirs).tolist())
    p, q = p_logits.softmax(-1)[:, ids], q_logits.softmax(-1)
    return SampledHits(coupled, torch.minimum(p, q).sum(-1).tolist())


def _logits(model: Model, answer: Answer) -> Tensor:
    """Return the logits that predict each token of ``answer``, [n, rows of the head]."""
    ids = torch.tensor([answer.prompt + answer.tokens[:-1]], device=model.model.device)
    output = model.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer.tokens))
    logits: Tensor = output.logits[0]
    return logits
