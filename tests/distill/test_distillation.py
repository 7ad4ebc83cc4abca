import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from amusd.distill.distillation import CHECKPOINT_NAME, Plan, distill
from amusd.distill.shards import save_shard
from amusd.distill.writer import Written
from amusd.engine.loading.device import DeviceSettings
from amusd.engine.loading.model_loading import load_model
from amusd.protocol.errors import InvalidInputError, UnavailableError
from tests import tiny
from tests.distill.conftest import Watched


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_result_is_served_as_a_draft_and_exported_for_transformers(
    plan: Plan, verify_folder: Path, tmp_path: Path
) -> None:
    result = distill(replace(plan, export=tmp_path / "whole"), Watched())
    engine = load_model(str(plan.output), "draft", DeviceSettings(threads=1))
    verify = load_model(str(verify_folder), "verify", DeviceSettings(threads=1))
    assert engine.description.vocabulary == verify.description.vocabulary
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    reduced = load_file(plan.output / "model.safetensors")
    logits = model(torch.arange(8)[None]).logits
    assert logits.shape[-1] == tiny.VOCABULARY
    assert len(reduced["head_token_ids"]) == 64
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], reduced[name])
    card = (plan.output / "README.md").read_text()
    assert f"{result.num_tokens:,} tokens" in card
    assert f"{result.held_out:.1%}" in card


def test_training_lowers_the_loss(plan: Plan) -> None:
    watched = Watched()
    distill(replace(plan, epochs=15, peak_rate=0.02), watched)
    losses = [report.loss for report in watched.reports]
    assert losses[-1] < 0.8 * losses[0]
    assert watched.reports[0].held_out is not None


@pytest.mark.parametrize("stop", [{"stop_after_writes": 2}, {"stop_after_reports": 1}])
def test_an_interrupted_run_gives_the_same_draft(
    plan: Plan, tmp_path: Path, stop: dict[str, int]
) -> None:
    long = replace(plan, num_tokens=1200)
    distill(long, Watched())
    other = tmp_path / "other"
    again = replace(long, output=other, data=other / "data")
    with pytest.raises(KeyboardInterrupt):
        distill(again, Watched(**stop))
    before = files(again.data)
    distill(again, Watched())
    assert before.items() <= files(again.data).items()
    ours, theirs = (
        load_file(plan.output / "model.safetensors"),
        load_file(other / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_text_is_shared_among_drafts(plan: Plan, tmp_path: Path) -> None:
    distill(plan, Watched())
    before = files(plan.data)
    distill(replace(plan, output=tmp_path / "deeper", num_layers=2), Watched())
    assert files(plan.data) == before


def test_a_checkpoint_of_another_recipe_is_refused_and_kept(plan: Plan) -> None:
    distill(plan, Watched())
    before = (plan.output / CHECKPOINT_NAME).read_bytes()
    with pytest.raises(InvalidInputError, match=r"has layers \(0,\), not \(0, 1\)"):
        distill(replace(plan, num_layers=2), Watched())
    assert (plan.output / CHECKPOINT_NAME).read_bytes() == before


def test_a_damaged_checkpoint_is_refused(plan: Plan) -> None:
    plan.output.mkdir()
    (plan.output / CHECKPOINT_NAME).write_bytes(b"half of")
    with pytest.raises(InvalidInputError, match="delete it to train again"):
        distill(plan, Watched())


def test_data_of_another_verify_model_is_refused(plan: Plan, tmp_path: Path) -> None:
    distill(plan, Watched())
    other = tmp_path / "another-verify"
    tiny.save(tiny.perturbed(tiny.build("llama"), 0.1), other)
    before = files(plan.data)
    with pytest.raises(InvalidInputError, match="holds text of another verify model"):
        distill(replace(plan, verify="other", location=str(other)), Watched())
    assert files(plan.data) == before


def test_a_checkpoint_of_another_verify_model_is_refused(plan: Plan, tmp_path: Path) -> None:
    distill(plan, Watched())
    other = tmp_path / "another-verify"
    tiny.save(tiny.perturbed(tiny.build("llama"), 0.1), other)
    elsewhere = replace(plan, verify="other", location=str(other), data=tmp_path / "data")
    with pytest.raises(InvalidInputError, match="belongs to another verify model"):
        distill(elsewhere, Watched())


def test_a_full_disk_keeps_what_was_written(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, rows: list[Written]) -> None:
        if path.name == "answers-000002.safetensors":
            raise UnavailableError("cannot write: free some space")
        save_shard(path, rows)

    monkeypatch.setattr("amusd.distill.distillation.save_shard", full)
    with pytest.raises(UnavailableError):
        distill(plan, Watched())
    names = set(files(plan.data))
    assert {"answers-000000.safetensors", "answers-000001.safetensors"} <= names
    monkeypatch.undo()
    distill(plan, Watched())
    assert names < set(files(plan.data))


def test_the_manifest_names_the_verify_model(plan: Plan) -> None:
    distill(plan, Watched())
    manifest = json.loads((plan.data / "manifest.json").read_text())
    assert manifest["verify"] == plan.verify
    assert manifest["vocab_size"] == tiny.VOCABULARY
