"""Adapters on the hub, imported by their names. There is no network: the hub's client is replaced by a stand-in, or
finds everything in its cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from models import make_slm, one_thread, saved  # noqa: F401
from peft_adapters import texts, write_adapter

from slm_fast import InputError, WorkError

COMMIT = "0" * 40
LABELS = ("north", "east", "south")


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """An adapter as people upload it: with its labels, and files that are of no use here."""
    folder = tmp_path_factory.mktemp("lora")
    write_adapter(folder, "bert")
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    for name in ("optimizer.pt", "training_args.bin", ".gitattributes"):
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture
def repository(lora, tmp_path, monkeypatch) -> Path:
    """Files of the hub repository user/lora. They are downloaded, as the hub's client does it, to `tmp_path / "here"`;
    another repository cannot be reached."""
    remote, here = Path(shutil.copytree(lora, tmp_path / "remote")), tmp_path / "here"

    def names(repo_id: str) -> list[str]:
        if repo_id != "user/lora":
            raise ConnectionError("no network")
        return sorted(path.name for path in remote.iterdir())

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        found = huggingface_hub.utils.filter_repo_objects(names(repo_id), allow_patterns=allow_patterns)
        here.mkdir()
        for name in found:
            shutil.copy(remote / name, here / name)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return remote


def test_an_adapter_on_the_hub_is_imported_by_its_name_with_its_labels(repository, tmp_path):
    slm = make_slm("bert")
    slm.import_adapter("user/lora", "sky", texts("sky"))
    downloaded = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert downloaded == ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    assert slm.learned["sky"].labels == LABELS
    other = make_slm("bert")
    other.import_adapter(repository, "sky", texts("sky"))
    rows = texts("sky", 4, seed=1)
    assert slm.predict(rows, top_k=None) == other.predict(rows, top_k=None)
    assert b"user/lora" not in saved(slm, "sky")  # a task says nothing of where it was found


def test_an_adapter_in_the_hubs_cache_needs_no_network(lora, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--user--lora"
    shutil.copytree(lora, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    slm = make_slm("bert")
    slm.import_adapter("user/lora", "sky", texts("sky"))
    assert slm.learned["sky"].labels == LABELS
    (repo / "snapshots" / COMMIT / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^adapter 'user/lora': no adapter_model.safetensors$"):
        slm.import_adapter("user/lora", "sea", texts("sky"))


@pytest.mark.parametrize(
    ("gone", "files", "said"),
    [
        (
            "adapter_model.safetensors",
            ["adapter_model.bin"],
            "no adapter_model.safetensors; adapter_model.bin is pickled: load it with PEFT and save it again",
        ),
        ("", ["model.safetensors"], "holds a full model (model.safetensors) and an adapter; put them in two folders"),
        ("", ["pytorch_model.bin.index.json"], "holds a full model (pytorch_model.bin.index.json) and an adapter"),
        (
            "adapter_config.json",
            ["model.safetensors"],
            "no adapter_config.json; model.safetensors there is a full model, which is a backbone; expected",
        ),
        ("adapter_config.json", [], "no adapter_config.json; expected a folder that PEFT's save_pretrained wrote"),
    ],
)
def test_a_repository_that_is_no_adapter_is_refused_and_its_other_files_are_not_downloaded(
    repository, tmp_path, gone, files, said
):
    (repository / (gone or "optimizer.pt")).unlink()
    for name in files:
        (repository / name).write_bytes(b"large")
    slm = make_slm("bert")
    with pytest.raises(InputError) as caught:
        slm.import_adapter("user/lora", "sky", texts("sky"))
    assert str(caught.value).startswith(f"adapter 'user/lora': {said}")
    assert slm.tasks == []
    assert not {path.name for path in (tmp_path / "here").iterdir()} & set(files)


def test_a_damaged_adapter_on_the_hub_says_to_download_it_again(repository):
    file = repository / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(WorkError, match=r"here/adapter_model\.safetensors: damaged: .*, or download it again$"):
        make_slm("bert").import_adapter("user/lora", "sky", texts("sky"))


def test_a_repository_that_cannot_be_reached_is_said(repository):
    with pytest.raises(InputError, match=r"^adapter 'user/other': cannot be downloaded from the hub: .*no network$"):
        make_slm("bert").import_adapter("user/other", "sky", texts("sky"))
