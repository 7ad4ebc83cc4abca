import json
from pathlib import Path

import pytest
import torch

from amusd.distill.cut import cut, reduce_head
from amusd.distill.draft_measurement import Bench, MeasurePlan
from amusd.distill.measured_acceptance import (
    Answer,
    Model,
    greedy_hits,
    load_answers,
    sampled_hits,
    save_answers,
)
from amusd.engine.loading.device import DeviceSettings
from amusd.engine.loading.model_loading import load_model
from amusd.engine.loading.reduced_head import load_causal_lm
from amusd.engine.reference import decode_autoregressive
from amusd.fleet.model_description import SYNTHETIC
from amusd.prompts import Prompt, encode
from amusd.protocol.errors import InvalidInputError
from tests import tiny

PROMPTS = (Prompt(text="one"), Prompt(text="two, three"), Prompt(text="f"))


def plan(verify: Path, answers: Path | None = None, temperature: float = 0.0) -> MeasurePlan:
    return MeasurePlan(
        verify=str(verify),
        prompts=PROMPTS,
        max_tokens=16,
        temperature=temperature,
        draws=3,
        lookahead=4,
        answers=answers,
        device=DeviceSettings(threads=1),
    )


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("near")
    tiny.save(tiny.perturbed(tiny.build("llama"), 0.05), folder)
    return folder


def test_a_model_agrees_with_itself_greedily_and_with_shared_noise(verify_folder: Path) -> None:
    report = Bench(plan(verify_folder, temperature=0.7)).measure(str(verify_folder))
    assert report.greedy.value == 1.0
    assert report.sampled is not None
    assert report.sampled.value == 1.0
    assert report.overlap == pytest.approx(1.0, abs=1e-4)
    assert report.num_layers == 2


def test_hits_are_what_decoding_with_the_draft_would_accept(
    verify_folder: Path, near: Path
) -> None:
    """The draft's engine, asked token by token, says the same as one pass over the answer."""
    device = DeviceSettings(threads=1)
    verify = load_model(str(verify_folder), "verify", device)
    draft = load_model(str(near), "draft", device)
    prompt = [5, 6, 7]
    answer = decode_autoregressive(verify, prompt, 24)
    expected = [
        decode_autoregressive(draft, prompt + answer[:n], 1) == answer[n : n + 1] for n in range(24)
    ]
    model, _ = load_causal_lm(str(near), torch.float32, "cpu")
    hits = greedy_hits(Model(model), Answer(tuple(prompt), tuple(answer)))
    assert hits == expected
    assert 0 < sum(hits) < 24


def test_sampled_hits_lie_within_the_bounds_of_the_coupling(
    verify_folder: Path, near: Path
) -> None:
    """At least (1 - TV) / (1 + TV), at most 1 - TV: Daliri et al., arXiv 2408.07978."""
    verify, _ = load_causal_lm(str(verify_folder), torch.float32, "cpu")
    draft, _ = load_causal_lm(str(near), torch.float32, "cpu")
    answer = Answer((1, 2), tuple(range(30, 70)))
    found = sampled_hits(Model(draft), Model(verify), answer, 1.0, draws=300, seed=0)
    rate = sum(map(sum, found.coupled)) / (300 * 40)
    tv = [1 - overlap for overlap in found.overlap]
    assert sum((1 - d) / (1 + d) for d in tv) / 40 - 0.02 < rate < sum(found.overlap) / 40 + 0.02


def test_a_token_outside_the_head_is_never_right(verify_folder: Path) -> None:
    verify, _ = load_causal_lm(str(verify_folder), torch.float32, "cpu")
    draft = cut(verify, [0, 1], None)
    kept = torch.tensor([9, 200])
    reduce_head(draft, kept)
    answer = Answer((1,), tuple(range(100, 120)))
    assert not any(greedy_hits(Model(draft, kept), answer))


def test_answers_are_kept_and_used_again(verify_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = Bench(plan(verify_folder, path)).measure(str(verify_folder))
    text = path.read_text()
    again = Bench(plan(verify_folder, path)).measure(str(verify_folder))
    assert path.read_text() == text
    assert again.greedy == first.greedy
    engine = load_model(str(verify_folder), "verify", DeviceSettings(threads=1))
    tokenizer = engine.description.tokenizer
    assert tokenizer == str(verify_folder)
    answers = load_answers(path, json.loads(text.splitlines()[0])["origin"])
    assert list(answers[0].tokens) == decode_autoregressive(engine, list(answers[0].prompt), 16)


def test_answers_of_another_model_are_refused(
    verify_folder: Path, near: Path, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    Bench(plan(verify_folder, path))
    with pytest.raises(InvalidInputError, match="other prompts or of another verify model"):
        Bench(plan(near, path))


def test_a_bad_line_of_answers_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    save_answers(path, [Answer((1,), (2,))], "here")
    path.write_text(path.read_text() + '{"prompt": 3}\n')
    with pytest.raises(InvalidInputError, match=r"answers\.jsonl, line 3: not an answer"):
        load_answers(path, "here")


def test_a_synthetic_model_has_nothing_to_measure(verify_folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="no weights to measure"):
        Bench(plan(verify_folder)).measure(SYNTHETIC)


def test_another_vocabulary_is_refused(verify_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    tiny.build("llama").save_pretrained(folder)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(["a new token"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InvalidInputError, match="share their tokenizer"):
        Bench(plan(verify_folder)).measure(str(folder))


def test_prompts_are_encoded_as_text(verify_folder: Path) -> None:
    assert encode(PROMPTS[0], tiny.byte_tokenizer()) == tiny.byte_tokenizer()("one")["input_ids"]
