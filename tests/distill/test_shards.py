from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from amusd.distill.files import write_whole
from amusd.distill.shards import DataFolder, DataManifest, load_shard, save_shard
from amusd.distill.writer import TextWriter
from amusd.protocol.errors import InvalidInputError, UnavailableError

MANIFEST = DataManifest("a model", "f1", vocab_size=256, top_k=8, answer_tokens=12, seed=0)


def test_what_is_saved_is_loaded(writer: TextWriter, tmp_path: Path) -> None:
    rows = writer.write([[1, 2], [3], [4, 5, 6]], [0.0, 1.0, 0.0], 5, seed=0)
    save_shard(tmp_path / "shard", rows)
    loaded = load_shard(tmp_path / "shard")
    assert [(row.prompt, row.tokens) for row in loaded] == [(r.prompt, r.tokens) for r in rows]
    for row, other in zip(rows, loaded, strict=True):
        assert torch.equal(row.top_ids, other.top_ids)
        assert torch.equal(row.top_logprobs, other.top_logprobs)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers-000000.safetensors"
    path.write_bytes(b"half of")
    with pytest.raises(InvalidInputError, match=r"answers-000000\.safetensors .*delete it"):
        load_shard(path)


def test_a_folder_opens_again_for_the_same_model_only(tmp_path: Path) -> None:
    DataFolder(tmp_path, MANIFEST)
    DataFolder(tmp_path, MANIFEST)
    with pytest.raises(InvalidInputError, match=r"another verify model \(a model, not b\)"):
        DataFolder(tmp_path, replace(MANIFEST, verify="b", fingerprint="f2"))
    with pytest.raises(InvalidInputError, match="has top_k 8, not 4"):
        DataFolder(tmp_path, replace(MANIFEST, top_k=4))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")])
def test_a_full_disk_is_said_and_the_old_file_stays(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise error

    with pytest.raises(UnavailableError, match="free some space"):
        write_whole(path, fail)
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
