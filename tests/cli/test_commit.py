"""Tests of the command line on failing commits, damaged tasks and merge conflicts, and of the README's example."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
from command import one_line, slm_fast
from models import easy, make_model, make_tokenizer, one_thread  # noqa: F401
from test_data import write_csv

from slm_fast.cli import learn
from slm_fast.errors import WorkError
from slm_fast.learn import learn_task
from slm_fast.store import Store

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commit") / "bert"
    make_model("bert").save_pretrained(folder)
    make_tokenizer("bert").save_pretrained(folder)
    return folder


def rows(path: Path, name: str = "sea", seed: int = 0) -> Path:
    return write_csv(path, *((row.text, row.target or "") for row in easy(name, 8, seed).rows))


def learned(store: Path, bert: Path, **files: Path):
    tasks = [f"--task={name}={path}" for name, path in files.items()]
    return slm_fast("learn", store, "--backbone", bert, "--epochs", 1, *tasks)


def tasks(store: Path) -> list[str]:
    return sorted(Store.open(store).files)


@pytest.mark.parametrize("failures", [1, 3])
def test_a_learned_task_whose_commit_fails_is_committed_later(
    failures: int, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, place, trained = [failures], Store._place, []

    def full(store: Store, *file: object) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")
        place(store, *file)

    monkeypatch.setattr("slm_fast.slm.learn_task", lambda *a, **k: trained.append(1) or learn_task(*a, **k))
    monkeypatch.setattr(Store, "_place", full)
    monkeypatch.setattr(learn, "PAUSE", 0.0)
    done = learned(tmp_path / "store", bert, sea=rows(tmp_path / "t.csv"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written: the disk is full; trying again (Ctrl-C gives up)") == failures
    assert len(trained) == 1
    assert tasks(tmp_path / "store") == ["sea"]


def test_after_a_while_a_commit_that_fails_is_given_up(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: Store, **changes: object) -> None:
        if changes.get("add"):
            raise WorkError("disk: cannot be written: No space left on device")

    learned(tmp_path / "store", bert, farm=rows(tmp_path / "f.csv", "farm"))
    monkeypatch.setattr(Store, "commit", full)
    monkeypatch.setattr(learn, "PATIENCE", 0.0)
    one_line(learned(tmp_path / "store", bert, sea=rows(tmp_path / "t.csv")), 1, "No space left", "kept in memory")
    assert tasks(tmp_path / "store") == ["farm"]


def test_learning_the_same_again_says_that_it_is_kept(bert: Path, tmp_path: Path) -> None:
    path, store = rows(tmp_path / "t.csv"), tmp_path / "store"
    assert "learned sea from 8 rows" in learned(store, bert, sea=path).stderr
    before = Store.open(store).files
    done = learned(store, bert, sea=path)
    assert done.returncode == 0
    warning, said = done.stderr.splitlines()
    assert "already learned from the same rows and options" in warning
    assert said.startswith("kept sea from 8 rows; ")
    assert Store.open(store).files == before


def test_a_damaged_task_is_skipped_if_asked_and_the_others_answer(bert: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    learned(store, bert, sea=rows(tmp_path / "s.csv"), farm=rows(tmp_path / "f.csv", "farm"))
    (file,) = (store / "tasks" / "farm").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    line = json.dumps({"text": "sea1 good0"})
    remedies = ("--skip-damaged", f"`slm-fast forget {store} farm`")
    one_line(slm_fast("predict", store, stdin=line), 1, file.name, *remedies)
    one_line(slm_fast("tasks", store), 1, file.name, *remedies)
    done = slm_fast("predict", store, "--skip-damaged", stdin=line)
    one_line(done, 0, "warning", file.name)
    assert json.loads(done.stdout)["task"] == "sea"
    listed = slm_fast("tasks", store, "--json", "--skip-damaged")
    assert list(json.loads(listed.stdout)) == ["sea"]
    shared = slm_fast("share", store, tmp_path / "shared", "--skip-damaged")
    assert shared.returncode == 0, shared.stderr
    assert tasks(tmp_path / "shared") == ["sea"]
    assert tasks(store) == ["farm", "sea"]  # the damaged task is not removed


def test_a_store_that_has_lost_its_manifest_is_refused_by_every_verb_and_kept(bert: Path, tmp_path: Path) -> None:
    store, other, file = tmp_path / "store", tmp_path / "other", rows(tmp_path / "s.csv")
    learned(store, bert, sea=file)
    learned(other, bert, farm=rows(tmp_path / "f.csv", "farm"))
    (store / "manifest.json").unlink()
    before = sorted(store.rglob("*.safetensors"))
    for done in (
        learned(store, bert, farm=tmp_path / "f.csv"),
        slm_fast("import", store, "--adapter", tmp_path, "--name", "a", "--examples", file, "--backbone", bert),
        slm_fast("merge", store, other),
        *(slm_fast(verb, store) for verb in ("verify", "tasks", "serve", "predict")),
        slm_fast("forget", store, "sea"),
    ):
        one_line(done, 2, f"{store}: has task files but no manifest.json; restore manifest.json")
    assert sorted(store.rglob("*.safetensors")) == before
    assert before


def test_a_file_in_the_place_of_a_store_is_refused_by_every_verb(bert: Path, tmp_path: Path) -> None:
    file, other = rows(tmp_path / "s.csv"), tmp_path / "other"
    learned(other, bert, sea=file)
    before = file.read_bytes()
    for done in (
        learned(file, bert, sea=file),
        slm_fast("merge", file, other),
        *(slm_fast(verb, file) for verb in ("verify", "tasks", "serve", "predict")),
    ):
        one_line(done, 2, f"{file}: is a file, expected a folder")
    assert file.read_bytes() == before


def test_another_backbone_than_the_stores_is_named_with_what_to_do(bert: Path, tmp_path: Path) -> None:
    store, other = tmp_path / "store", tmp_path / "other"
    learned(store, bert, sea=rows(tmp_path / "s.csv"))
    make_model("bert", seed=1).save_pretrained(other)
    make_tokenizer("bert").save_pretrained(other)
    done = learned(store, other, farm=rows(tmp_path / "f.csv", "farm"))
    one_line(done, 2, f"store {store} was made with {str(bert)!r}; leave out backbone= (--backbone)")
    assert re.search("[0-9a-f]{16}", done.stderr) is None


def test_verify_says_what_a_damaged_cache_is(bert: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    learned(store, bert, sea=rows(tmp_path / "s.csv"), farm=rows(tmp_path / "f.csv", "farm"))
    assert slm_fast("predict", store, stdin="").returncode == 0  # writes .keys
    data = (store / ".keys").read_bytes()
    for at in (40, len(data) - 1):  # in the head, where a commit also sees it, and at the end
        (store / ".keys").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        one_line(slm_fast("verify", store), 1, f"{store / '.keys'}: a cache that is damaged")
    (store / ".keys").write_bytes(data[:88] + bytes(8) + data[96:])
    done = slm_fast("verify", store)
    assert done.stderr == f"{store / '.keys'}: a cache that is not used here; it is made again where it is needed\n"
    assert done.returncode == 0


def test_merge_takes_the_preferred_stores_task_where_two_have_one_name(bert: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    learned(one, bert, sea=rows(tmp_path / "1.csv"))
    learned(two, bert, sea=rows(tmp_path / "2.csv", seed=1))
    one_line(slm_fast("merge", tmp_path / "all", one, two), 2, "'sea'", "--prefer")
    for preferred in (two, one):
        done = slm_fast("merge", tmp_path / preferred.name / "all", one, two, "--prefer", preferred)
        assert done.returncode == 0, done.stderr
        assert Store.open(tmp_path / preferred.name / "all").files == Store.open(preferred).files


def test_a_split_is_spelled_and_named_as_the_task_it_belongs_to(bert: Path, tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "data"
    folder.mkdir()
    (folder / "labels.json").write_text('["bad", "good", "so so"]')
    train = write_csv(folder / "train.csv", *((f"sea{i}", str(i % 3)) for i in range(9)))
    part = write_csv(folder / "part.csv", ("sea1", "2"), ("sea2", "0"))
    done = slm_fast("learn", store, "--backbone", bert, "--epochs", 1, f"--task=t={train}", f"--valid=t={part}")
    assert done.returncode == 0, done.stderr
    done = slm_fast("evaluate", store, f"--task=t={part}", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    scores = write_csv(tmp_path / "scores.csv", *((f"sea{i}", ("1.0", "2.5")[i % 2]) for i in range(8)))
    whole = write_csv(tmp_path / "whole.csv", ("sea1", "1.0"))
    done = slm_fast("learn", store, "--epochs", 1, f"--task=s={scores}", f"--valid=s={whole}")
    assert done.returncode == 0, done.stderr
    assert slm_fast("evaluate", store, f"--task=s={whole}").returncode == 0


@pytest.mark.parametrize("second", ["-", "/dev/stdin"])
def test_standard_input_is_given_once(second: str, bert: Path, tmp_path: Path) -> None:
    done = slm_fast("learn", tmp_path / "store", "--backbone", bert, "--task", "t=-", "--valid", f"t={second}")
    one_line(done, 2, "standard input (-): can be read once")


def test_the_readmes_example_runs_twice_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, example, *_ = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name in ("reviews.csv", "reviews-test.csv"):
        write_csv(
            tmp_path / name, ("The soup was cold.", "bad"), ("A lovely evening.", "good"), ("Never again.", "bad")
        )
    tickets = [{"body": "Where is my parcel?", "queue": "delivery"}, {"body": "It is broken.", "queue": "repair"}]
    for _ in range(2):
        space = {"rows": tickets}
        exec(example, space)
        assert space["slm"].tasks == ["tickets"]
