"""Sharing stores: the folder to upload, its model card, and stores in the hub's cache. Without a network, the upload
itself is not tested."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from command import one_line, slm_fast
from models import (
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    reopened,
    two_tasks,
)
from stores import tree

from slm_fast import Evaluation, InputError, ScalableLM, WorkError
from slm_fast.hub import find_store, is_on_hub
from slm_fast.store import Store

pytestmark = [pytest.mark.usefixtures("few_features"), pytest.mark.filterwarnings("ignore:backbone '':UserWarning")]
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def slm() -> ScalableLM:
    slm = make_slm("bert", features=32)
    return knows(slm, *two_tasks(slm))  # farm: no, yes; sea: maybe, no, yes


@pytest.fixture
def hub(slm, tmp_path, monkeypatch) -> str:
    """Hub name of a store that is in the hub client's cache, in the client's layout."""
    cache = tmp_path / "hub"
    repo = cache / "models--user--animals"
    slm.share(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "user/animals"


def card_of(folder: Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard.load(folder / "README.md")


def test_what_is_shared_is_a_store_that_answers_alike(slm, tmp_path):
    slm.share(tmp_path / "shared")
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["README.md", "manifest.json", "tasks"]
    assert Store.open(tmp_path / "shared").verify() == []
    again = reopened(tmp_path / "shared")
    assert again.predict(mixed()) == slm.predict(mixed())
    again.forget("farm")  # it is an ordinary store that can be changed
    assert reopened(tmp_path / "shared").tasks == ["sea"]
    assert (tmp_path / "shared" / "README.md").exists()


def test_the_card_says_what_the_tasks_are_and_how_well_they_were_answered(slm, tmp_path):
    evaluation = Evaluation({"farm": 0.975, "city": 0.5}, {"farm": 1.0, "city": 1.0})
    slm.share(tmp_path / "shared", evaluation=evaluation, base_model="user/tiny-bert")
    card = card_of(tmp_path / "shared")
    assert card.data.to_dict() == {
        "library_name": "slm-fast",
        "base_model": "user/tiny-bert",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "tags": ["slm-fast", "lora", "continual-learning"],
    }
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert rows == [
        "| task | answers | rows | rank | accuracy |",
        "| --- | --- | --- | --- | --- |",
        "| farm | no, yes | 24 | 4 | 0.975 |",
        "| sea | maybe, no, yes | 24 | 4 |  |",
    ]
    assert slm.model.backbone.fingerprint in card.text
    manifest = json.loads((tmp_path / "shared" / "manifest.json").read_text())
    assert manifest["model"]["backbone"] == "user/tiny-bert"


def test_the_same_tasks_make_the_same_folder_whatever_came_before(slm, tmp_path):
    slm.share(tmp_path / "one")
    other = knows(make_slm("bert", features=32), random_task(slm, "city"))
    other.add([slm.learned["sea"], slm.learned["farm"]])
    other.forget("city")
    other.share(tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_card_of_a_backbone_that_writes(name, tmp_path):
    slm = make_slm(name, features=32)
    knows(slm, random_task(slm, "sea", labels=None))
    slm.share(tmp_path / "shared")
    card = card_of(tmp_path / "shared")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # the model has no name
    assert "| sea | free text | 24 | 4 |" in card.text
    assert "answer.text" in card.text


def test_words_of_labels_are_shown_as_they_are(tmp_path):
    slm = make_slm("bert", features=32)
    labels = ["a|b", "<img src=x>", "[x](y)", *(f"l{i}" for i in range(8))]
    knows(slm, random_task(slm, "sea", labels=labels))
    slm.share(tmp_path / "shared", tasks="sea")
    row = r"| sea | 11 labels: a\|b, \<img src=x\>, \[x\](y), l0, l1, l2, l3, l4 and 3 more | 24 | 4 |"
    assert row in card_of(tmp_path / "shared").text


def test_one_task_is_shared_alone_and_merged_elsewhere(slm, tmp_path):
    slm.share(tmp_path / "sea", tasks="sea")
    assert reopened(tmp_path / "sea").tasks == ["sea"]
    other = knows(make_slm("bert", features=32), random_task(slm, "city"))
    other.save_pretrained(tmp_path / "other")
    assert slm_fast("merge", tmp_path / "other", tmp_path / "sea").returncode == 0
    merged = reopened(tmp_path / "other")
    assert merged.tasks == ["city", "sea"]
    assert Store.open(tmp_path / "other").files["sea"] == Store.open(tmp_path / "sea").files["sea"]


def test_a_folder_of_this_machine_is_not_named_to_others(slm, tmp_path):
    path = tmp_path / "my-bert"
    make_model("bert").save_pretrained(path)
    make_tokenizer("bert").save_pretrained(path)
    here = ScalableLM.from_backbone(str(path), features=32)
    here.add(slm.learned["sea"])
    with pytest.warns(UserWarning, match=r"^backbone 'my-bert': a folder here, or without a name; base_model="):
        here.share(tmp_path / "shared")
    for file in ("README.md", "manifest.json"):
        assert str(tmp_path) not in (tmp_path / "shared" / file).read_text()
    assert "base_model" not in card_of(tmp_path / "shared").data.to_dict()
    assert ScalableLM.from_pretrained(tmp_path / "shared", backbone=str(path)).tasks == ["sea"]


def test_a_packaged_backbone_has_its_name_on_the_hub(slm, tmp_path):
    slm.save_pretrained(tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"backbone": ""', '"backbone": "minilm"'))
    done = slm_fast("share", tmp_path / "store", tmp_path / "shared", "--task", "farm")
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{tmp_path}/shared: farm, and a model card (README.md)\n"
    assert card_of(tmp_path / "shared").data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert Store.open(tmp_path / "shared").about["backbone"] == "minilm"
    slm.store = None


def test_the_card_has_what_the_command_line_measured(slm, tmp_path):
    knows(make_slm("bert", features=32), *slm.learned.values()).save_pretrained(tmp_path / "store")
    (tmp_path / "e.json").write_text(json.dumps({"accuracy": {"sea": 1}, "routing": {"sea": 1.0}, "average": 1.0}))
    to = ["share", tmp_path / "store", tmp_path / "shared", "--base-model", "user/b", "--evaluation"]
    one_line(slm_fast(*to, tmp_path / "no.json"), 2, "no.json: no such file")
    (tmp_path / "bad.json").write_text('{"accuracy": {"sea": 1.5}}')
    one_line(slm_fast(*to, tmp_path / "bad.json"), 1, "bad.json: not what", "accuracy.sea")
    assert slm_fast(*to, tmp_path / "e.json").returncode == 0
    assert "| sea | maybe, no, yes | 24 | 4 | 1.000 |" in card_of(tmp_path / "shared").text


def test_what_cannot_be_shared_is_said_and_nothing_is_written(slm, tmp_path):
    with pytest.raises(InputError, match=r"^task 'sky': not learned; tasks: farm, sea"):
        slm.share(tmp_path / "shared", tasks=["sea", "sky"])
    with pytest.raises(InputError, match=r"^tasks: there are none to share"):
        make_slm("bert", features=32).share(tmp_path / "shared")
    with pytest.raises(InputError, match=r"^evaluation: expected what evaluate"):
        slm.share(tmp_path / "shared", evaluation={"sea": 1.0})
    assert not (tmp_path / "shared").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(
        InputError, match=r"full: already exists; expected an empty folder, or a path that does not exist"
    ):
        slm.share(tmp_path / "full")
    with pytest.raises(InputError, match=r"^repo_id: expected a name such as user/store, got '../x'"):
        slm.push_to_hub("../x")


def test_without_a_network_a_push_is_one_line(slm, tmp_path):
    with pytest.raises(WorkError, match=r"^user/animals: cannot be pushed to the hub: .*") as error:
        slm.push_to_hub("user/animals")
    assert "\n" not in str(error.value)
    knows(make_slm("bert", features=32), *slm.learned.values()).save_pretrained(tmp_path / "store")
    before = tree(tmp_path / "store")
    done = slm_fast("push", tmp_path / "store", "user/animals", "--base-model", "user/tiny-bert")
    one_line(done, 1, "user/animals: cannot be pushed to the hub: ")
    assert tree(tmp_path / "store") == before


# From the hub


def test_a_store_on_the_hub_is_opened_by_its_name_and_belongs_to_no_store(slm, hub, tmp_path):
    found = reopened(hub)
    assert found.predict(mixed()) == slm.predict(mixed())
    assert found.store is None
    found.forget("sea")
    again = ScalableLM.from_pretrained(
        hub, backbone=make_model("bert"), tokenizer=make_tokenizer("bert"), revision="main"
    )
    assert again.tasks == ["farm", "sea"]  # the cache is not changed


def test_tasks_of_a_store_on_the_hub_are_listed_verified_and_merged(hub, tmp_path, slm):
    assert json.loads(slm_fast("tasks", hub, "--json").stdout).keys() == {"farm", "sea"}
    assert slm_fast("verify", hub).returncode == 0
    done = slm_fast("merge", tmp_path / "mine", hub, "--task", "farm")
    assert done.returncode == 0, done.stderr
    assert Store.open(tmp_path / "mine").files == {"farm": find_store(hub).files["farm"]}
    one_line(
        slm_fast("merge", tmp_path / "mine", hub, "--task", "sky"), 2, "task 'sky': in none of the stores", "farm, sea"
    )
    assert Store.open(tmp_path / "mine").verify() == []


def test_a_damaged_file_in_the_hubs_cache_is_not_to_be_forgotten_there(hub):
    file = find_store(hub).file("farm")
    file.write_bytes(file.read_bytes()[:-1])
    for verb in ("tasks", "verify"):
        done = slm_fast(verb, hub)
        one_line(done, 1, f"{file}: damaged", "--skip-damaged")
        assert "forget" not in done.stderr


def test_what_is_not_there_is_one_line(hub, tmp_path, monkeypatch):
    one_line(slm_fast("tasks", "user/nothing"), 2, "store user/nothing: no such folder, and cannot be downloaded from")
    one_line(
        slm_fast("predict", "user/nothing"), 2, "store user/nothing: no such folder, and cannot be downloaded from"
    )
    with pytest.raises(InputError, match=r"^revision: goes with a store on the hub"):
        ScalableLM.from_pretrained(tmp_path, revision="main")
    snapshot = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--user--animals" / "snapshots" / COMMIT
    (snapshot / "manifest.json").unlink()
    shutil.rmtree(snapshot / "tasks")
    one_line(slm_fast("tasks", hub), 2, "holds no store (no manifest.json)")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    assert not is_on_hub("user/animals")  # the folder `user` exists: a mistyped path, not a hub name
    one_line(slm_fast("tasks", "user/animals"), 2, "user/animals: not a store (no manifest.json)")
