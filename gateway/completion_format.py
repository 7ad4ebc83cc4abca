"""Answers of /v1/completions."""

from typing import Any

from amusd.v1 import orchestrator_pb2, sampling_pb2
from gateway.answer_format import KeptOutput, end_fields, finish_reason
from gateway.job import Job
from gateway.logprob_format import CompletionLogprobs, join_logprobs


class _Choice:
    """The state of one choice."""

    def __init__(self) -> None:
        self.logprobs = CompletionLogprobs()
        self.kept = KeptOutput()
        self.has_begun = False


class CompletionFormat:
    """Writes the choices of a completion."""

    id_prefix = "cmpl-"
    whole_kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, job: Job) -> None:
        """Write the answer of ``job``."""
        self._job = job
        self._choices = [_Choice() for _ in range(job.num_choices)]
        self._prompt_logprobs: dict[int, list[sampling_pb2.PositionLogprobs]] = {}

    def piece(self, prompt: int, chunk: orchestrator_pb2.Chunk) -> list[dict[str, Any]]:
        """Return the choice of a chunk; none if there is nothing to say yet."""
        self._keep_prompt(prompt, chunk)
        if not chunk.token_ids:
            return []  # more of the prompt follows
        number, choice = self._find(prompt, chunk.index)
        token_ids = [] if self._job.echo_only else list(chunk.token_ids)
        text, parts = "" if self._job.echo_only else chunk.text, []
        if not choice.has_begun:
            text = self._echo(prompt) + text
            parts += self._echoed_logprobs(prompt, choice)
            choice.has_begun = True
        if self._job.logprobs and token_ids:
            parts.append(choice.logprobs.tokens(chunk.logprobs))
        if not (text or parts or (self._job.token_ids and token_ids)):
            return []
        logprobs = join_logprobs(parts) if parts else None
        found = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": None}
        return [self._with_ids(found, token_ids)]

    def end(self, prompt: int, completion: orchestrator_pb2.Completion) -> list[dict[str, Any]]:
        """Return the last choice of an output."""
        number, _ = self._find(prompt, completion.index)
        text = "" if self._job.echo_only else completion.text
        return [self._ended(number, text, None, completion)]

    def keep(self, prompt: int, chunk: orchestrator_pb2.Chunk) -> None:
        """Keep a chunk."""
        self._keep_prompt(prompt, chunk)
        if not self._job.echo_only:
            self._find(prompt, chunk.index)[1].kept.add(chunk)

    def whole(self, prompt: int, completion: orchestrator_pb2.Completion) -> dict[str, Any]:
        """Return the whole choice of an output."""
        number, choice = self._find(prompt, completion.index)
        kept = choice.kept
        rest = "" if self._job.echo_only else completion.text
        text = "".join((self._echo(prompt), *kept.texts, rest))
        logprobs = None
        if self._job.logprobs:
            parts = self._echoed_logprobs(prompt, choice)
            logprobs = join_logprobs([*parts, choice.logprobs.tokens(kept.logprobs)])
        return self._with_ids(self._ended(number, text, logprobs, completion), kept.token_ids)

    def _find(self, prompt: int, index: int) -> tuple[int, _Choice]:
        number = prompt * self._job.num_completions + index
        return number, self._choices[number]

    def _keep_prompt(self, prompt: int, chunk: orchestrator_pb2.Chunk) -> None:
        if chunk.prompt_logprobs:
            self._prompt_logprobs.setdefault(prompt, []).extend(chunk.prompt_logprobs)

    def _echo(self, prompt: int) -> str:
        """Return the prompt to repeat. One of token ids is known from its second token on."""
        if self._job.echo is None:
            return ""
        positions = self._prompt_logprobs.get(prompt, [])
        return self._job.echo[prompt] or b"".join(one.token.text for one in positions).decode(
            errors="replace"
        )

    def _echoed_logprobs(self, prompt: int, choice: _Choice) -> list[dict[str, Any]]:
        if self._job.echo is None or not self._job.logprobs:
            return []
        positions = self._prompt_logprobs.get(prompt, [])
        return [choice.logprobs.prompt(self._job.echo[prompt], positions)]

    def _ended(
        self,
        number: int,
        text: str,
        logprobs: dict[str, Any] | None,
        completion: orchestrator_pb2.Completion,
    ) -> dict[str, Any]:
        return {
            "index": number,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(completion),
            **end_fields(self._job, completion),
        }

    def _with_ids(self, choice: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
        if self._job.token_ids:
            choice["token_ids"] = token_ids
        return choice
