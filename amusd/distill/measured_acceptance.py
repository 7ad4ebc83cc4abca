"""Teacher-forced acceptance of drafts, token by token.

A draft sees the verify model's own tokens and predicts the next one. The services do the same as
long as earlier proposals are accepted. One pass measures a whole answer.
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
    """A prompt and the verify model's answer."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model; ``head_ids`` [H] are the tokens of a reduced output head."""

    model: PreTrainedModel
    head_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SampledHits:
    """The hits of an answer that is sampled at one temperature.

    ``coupled`` has the hits of samples that share their noise, one row per draw of the noise.
    ``overlap`` [n] is the sum of the smaller probabilities, 1 - TV. It bounds the acceptance of any
    coupling of the two distributions.
    """

    coupled: list[list[bool]]
    overlap: list[float]


def write_answers(
    writer: TextWriter, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float
) -> list[Answer]:
    """Let the verify model answer ``prompts``; prompts of similar length share a batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for first in range(0, len(order), _WRITE_ROWS):
        group = order[first : first + _WRITE_ROWS]
        rows = [prompts[i] for i in group]
        temperatures = [temperature] * len(group)
        for i, row in zip(
            group, writer.write(rows, temperatures, max_tokens, first, to_the_end=True), strict=True
        ):
            answers[i] = Answer(tuple(row.prompt), tuple(row.tokens))
    return [answers[i] for i in range(len(prompts))]


def save_answers(path: Path, answers: Sequence[Answer], origin: str) -> None:
    """Write answers as JSON lines; ``origin`` identifies their model and prompts.

    Raises:
        UnavailableError: the file cannot be written.
    """
    lines = [json.dumps({"origin": origin}), *(json.dumps(asdict(answer)) for answer in answers)]
    text = "\n".join(lines) + "\n"
    write_text_whole(path, text)


def load_answers(path: Path, origin: str) -> list[Answer]:
    """Read answers that ``save_answers`` wrote.

    Raises:
        InvalidInputError: they have another origin, or a line is invalid.
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
                f"{path}, line {number}: not an answer; delete the file to create it again"
            ) from None
    if found != origin:
        raise InvalidInputError(
            f"{path} holds answers to other prompts or of another verify model: choose another file"
        )
    return answers


@torch.inference_mode()
def greedy_hits(draft: Model, answer: Answer) -> list[bool]:
    """Return for each token of ``answer`` whether the draft's greedy token equals it."""
    rows = _logits(draft, answer).argmax(-1)
    tokens = rows if draft.head_ids is None else draft.head_ids[rows]
    hits: list[bool] = (tokens.cpu() == torch.tensor(answer.tokens)).tolist()
    return hits


@torch.inference_mode()
def sampled_hits(
    draft: Model, verify: Model, answer: Answer, temperature: float, draws: int, seed: int
) -> SampledHits:
    """Return where the draft and the verify model sample the same token.

    Sampling is coupled: both add the same Gumbel noise to logits / temperature and take the argmax
    (Daliri et al., arXiv 2408.07978). ``draws`` is the number of noise draws.
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
        verified = (p_logits + gumbel).argmax(-1)
        drafted = ids[(q_logits + gumbel[:, ids]).argmax(-1)]
        coupled.append((verified == drafted).tolist())
    p, q = p_logits.softmax(-1)[:, ids], q_logits.softmax(-1)
    return SampledHits(coupled, torch.minimum(p, q).sum(-1).tolist())


def _logits(model: Model, answer: Answer) -> Tensor:
    """Return the logits of each token of ``answer``, [n, rows of the head]."""
    ids = torch.tensor([answer.prompt + answer.tokens[:-1]], device=model.model.device)
    output = model.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer.tokens))
    logits: Tensor = output.logits[0]
    return logits
