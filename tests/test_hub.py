"""Sharing stores: the folder to upload, its model card, uploads, and stores on the hub. There is no network: the hub's
client is replaced by a stand-in, or finds everything in its cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from command import one_line, slm_fast
from models import (
    easy,
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
from peft_adapters import texts, write_adapter
from stores import tree

from slm_fast import Evaluation, InputError, ScalableLM, WorkError, __version__
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


def test_the_card_of_a_store_that_writes_and_classifies_prints_either_answer(tmp_path):
    slm = make_slm("llama", features=32)
    for name, labels in (("write", None), ("classify", 3)):
        write_adapter(tmp_path / name, "llama", labels=labels)
        slm.import_adapter(tmp_path / name, name, texts("sky"))
    slm.share(tmp_path / "shared")
    card = card_of(tmp_path / "shared")
    assert "print(answer.task, answer.label or answer.text, answer.score)" in card.text
    assert "| write | free text | 24 examples (imported) | 4 |" in card.text


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
def test_the_card_says_how_many_rows_a_task_was_learned_from_with_either_router(router, tmp_path):
    slm = make_slm("bert", **({"features": 32} if router == "gaussian" else {"router": "dtkr", "groups": 4}))
    slm.save_pretrained(tmp_path / "store")
    for _ in range(2):
        slm.learn(easy("sea", rows=6), epochs=1)  # the second time does nothing
    write_adapter(tmp_path / "adapter", "bert")
    slm.import_adapter(tmp_path / "adapter", "sky", texts("sky", 21))
    knows(slm, random_task(slm, "farm"), *slm.learned.values())  # keeps no count with dtkr, as in older stores
    slm.share(tmp_path / "shared")
    rows = [line.split(" | ")[2] for line in card_of(tmp_path / "shared").text.splitlines() if line.startswith("| ")]
    assert rows == ["rows", "---", "24" if router == "gaussian" else "", "6", "21 examples (imported)"]
    assert reopened(tmp_path / "store").learned["sea"].options.get("rows") == (None if router == "gaussian" else 6)


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


class FakeApi:
    """Stands in for the hub's client: notes what it is asked, and what the folder to upload holds."""

    asked: tuple[tuple[str, dict], ...] = ()
    uploaded: dict[str, bytes]
    error: Exception | None = None

    def __init__(self, **options) -> None:
        assert options == {"library_name": "slm-fast", "library_version": __version__}

    def create_repo(self, repo_id: str, **options) -> huggingface_hub.RepoUrl:
        self.note("create_repo", {"repo_id": repo_id, **options})
        owner = "" if "/" in repo_id else "me/"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{owner}{repo_id}")

    def upload_folder(self, *, folder_path: Path, **options) -> None:
        FakeApi.uploaded = tree(folder_path)
        self.note("upload_folder", options)

    def note(self, call: str, options: dict) -> None:
        if FakeApi.error is not None and call == "upload_folder":
            raise FakeApi.error
        FakeApi.asked = (*FakeApi.asked, (call, options))


@pytest.fixture
def api(monkeypatch) -> type[FakeApi]:
    monkeypatch.setattr(FakeApi, "asked", ())
    monkeypatch.setattr(FakeApi, "error", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi


@pytest.mark.parametrize("private", [None, True, False])
def test_a_push_creates_the_repository_and_uploads_what_share_writes(slm, api, tmp_path, private):
    evaluation = Evaluation({"farm": 0.975}, {"farm": 1.0})
    how = {"evaluation": evaluation, "base_model": "user/tiny-bert"}
    url = slm.push_to_hub("user/animals", private=private, commit_message="Two tasks", **how)
    assert url == "https://huggingface.co/user/animals"
    assert api.asked == (
        ("create_repo", {"repo_id": "user/animals", "private": private, "exist_ok": True}),
        (
            "upload_folder",
            {"repo_id": "user/animals", "delete_patterns": ["tasks/*"], "commit_message": "Two tasks"},
        ),
    )
    slm.share(tmp_path / "shared", **how)
    expected = tree(tmp_path / "shared")
    readme = api.uploaded.pop("README.md").decode()
    card = expected.pop("README.md").decode()
    assert api.uploaded == expected
    assert readme == card.replace("# farm, sea", "# user/animals").replace(
        '"path of this folder"', '"user/animals"'
    ).replace("my-store FOLDER", "my-store user/animals")


def test_a_push_of_one_task_to_a_name_without_its_user(slm, api):
    assert slm.push_to_hub("animals", tasks="sea", base_model="user/tiny-bert") == "https://huggingface.co/me/animals"
    (_, created), (_, uploaded) = api.asked
    assert (created["repo_id"], uploaded["repo_id"]) == ("animals", "me/animals")
    assert uploaded["commit_message"] == "Upload a store of slm_fast"
    assert json.loads(api.uploaded["manifest.json"])["tasks"].keys() == {"sea"}


def test_what_the_hub_refuses_is_one_line(slm, api):
    api.error = ValueError("403 Forbidden: no write token")
    with pytest.raises(WorkError, match=r"^user/animals: cannot be pushed to the hub: 403 Forbidden: no write token$"):
        slm.push_to_hub("user/animals", base_model="user/tiny-bert")
    assert [call for call, _ in api.asked] == ["create_repo"]


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
