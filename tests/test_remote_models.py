"""Models of a store at a URL: they predict as models of the store itself, follow its changes and never write to it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from command import one_line, slm_fast
from models import (
    beside_its_backbone,
    bits,
    knows,
    make_slm,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    reopened,
    two_tasks,
)
from shelf import URL, asked
from stores import tree

from slm_fast import InputError, ScalableLM, WorkError
from slm_fast.errors import SlmWarning
from slm_fast.remote_store import cache_of
from slm_fast.store import Store

pytestmark = pytest.mark.usefixtures("few_features")


@pytest.fixture
def slm(shelf: Path) -> ScalableLM:
    """The model that writes the store at `URL`."""
    slm = make_slm("bert", features=32)
    knows(slm, *two_tasks(slm))
    slm.save_pretrained(shelf)
    return slm


def alike(one: ScalableLM, other: ScalableLM) -> bool:
    return all(torch.equal(*pair) for pair in zip(bits(one), bits(other), strict=True))


def test_it_answers_bit_for_bit_as_the_store_itself(slm, shelf, cache):
    found = reopened(URL)
    assert found.predict(mixed()) == slm.predict(mixed())
    assert alike(found, reopened(shelf))
    assert (found.store, found.tasks) == (None, ["farm", "sea"])
    assert "store='shelf://store'" in repr(found)
    assert (cache / ".keys").exists()  # written on opening, as for a local store
    assert reopened(URL).model.router.is_kept
    assert found.predict_proba(mixed()).tolist() == reopened(URL).predict_proba(mixed()).tolist()


def test_refresh_takes_over_what_was_committed_at_the_url(slm, shelf, cache):
    found = reopened(URL)
    asked()
    found.refresh()
    assert asked() == ["manifest.json"]
    gone = cache / "tasks" / "farm"
    assert gone.exists()
    slm.forget("farm")
    slm.add(random_task(slm, "sky"))
    found.refresh()
    assert found.tasks == ["sea", "sky"]
    assert alike(found, slm)
    assert not gone.exists()
    assert tree(cache) == tree(shelf)
    assert Store.open(cache).verify() == []  # `.keys` contains nothing of the removed task


def test_a_source_that_is_gone_or_damaged_leaves_the_model_as_it_is(slm, shelf, cache):
    found = reopened(URL)
    before, there = found.predict(mixed()), tree(cache)
    slm.add(random_task(slm, "sky"))
    file = shelf / "tasks" / "sky" / f"{slm.store.files['sky']}.safetensors"
    file.write_bytes(b"")
    with pytest.raises(WorkError, match=r"^shelf://store/tasks/sky/.*: damaged"):
        found.refresh()
    shutil.rmtree(shelf)
    with pytest.raises(InputError, match=r"^shelf://store: not a store"):
        found.refresh()
    Store(shelf, {**slm.model.about, "fingerprint": "another"}, {}).save([])
    with pytest.raises(InputError, match=r"^shelf://store: fingerprint is 'another', the store that was opened has"):
        found.refresh()
    shutil.rmtree(shelf)
    assert tree(cache) == there
    assert found.predict(mixed()) == before
    with pytest.raises(InputError, match=r"^shelf://store: not a store"):
        reopened(URL)


def test_what_is_learned_and_forgotten_is_in_memory_until_it_is_saved(slm, shelf, cache, tmp_path):
    source = tree(shelf)
    found = reopened(URL)
    there = tree(cache)
    asked()
    found.forget("farm")
    found.add(random_task(slm, "city"))
    with pytest.raises(InputError, match=r"^task 'farm': not learned; tasks: city, sea"):
        found.forget("farm")
    assert asked() == []
    found.refresh()
    assert found.tasks == ["city", "sea"]  # the source has not changed, so local changes stay
    assert (tree(shelf), tree(cache)) == (source, there)
    with pytest.raises(InputError, match=r"^shelf://store: expected the path of a folder; .* is only read"):
        found.save_pretrained(URL)
    with pytest.raises(InputError, match=r"^shelf://other: expected the path of a folder"):
        found.share("shelf://other")
    found.save_pretrained(tmp_path / "mine")
    shutil.rmtree(shelf)
    found.refresh()
    found.forget("city")  # written to disk, since the model now belongs to a folder
    assert reopened(tmp_path / "mine").tasks == ["sea"]
    assert "mine" in repr(found)


def test_of_a_task_of_both_the_one_that_is_new_at_the_url_counts(slm):
    found = reopened(URL)
    found.forget("farm")
    found.add(random_task(slm, "farm", rank=2))  # replaced, in memory only
    found.add(random_task(slm, "sky", rank=2))
    found.refresh()
    assert [found.learned[name].rank for name in found.tasks] == [2, 4, 2]
    slm.forget("farm")
    found.refresh()
    assert found.tasks == ["farm", "sea", "sky"]  # farm and sky are those added locally
    slm.add(random_task(slm, "sky"))
    slm.add(random_task(slm, "farm", rank=3))
    with pytest.warns(SlmWarning, match=r"shelf://store has another since; what was not committed here is dropped"):
        found.refresh()
    assert [found.learned[name].rank for name in found.tasks] == [3, 4, 4]
    slm.forget("sky")
    found.refresh()
    assert found.tasks == ["farm", "sea"]


def test_a_file_is_answered_on_where_a_run_stopped_unless_the_store_has_changed(slm, tmp_path):
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in mixed()))
    reopened(URL).predict_file(source, sink)
    whole = sink.read_bytes()
    sink.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    reopened(URL).predict_file(source, sink)
    assert sink.read_bytes() == whole
    changed = reopened(URL)
    changed.add(random_task(slm, "sky"))
    with pytest.raises(InputError, match=r"out.jsonl"):
        changed.predict_file(source, sink)


# The command line


@pytest.fixture
def url(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("SLM_FAST_CACHE", str(tmp_path / "cache"))
    return f"file://{beside_its_backbone(tmp_path, two_tasks)}"


def test_verbs_that_read_take_a_url(url, tmp_path):
    rows = "".join(json.dumps({"text": text, "label": "no"}) + "\n" for text in mixed())
    (tmp_path / "rows.jsonl").write_text(rows)
    answered = [slm_fast("predict", store, "--input", tmp_path / "rows.jsonl") for store in (url, tmp_path / "store")]
    assert [done.returncode for done in answered] == [0, 0], answered[0].stderr
    assert answered[0].stdout == answered[1].stdout
    assert len(answered[0].stdout.splitlines()) == len(mixed())
    report = ("--report", tmp_path / "page.html")
    done = slm_fast("evaluate", url, "--task", f"farm={tmp_path / 'rows.jsonl'}", "--json", *report)
    assert json.loads(done.stdout)["accuracy"].keys() == {"farm"}
    assert url in (tmp_path / "page.html").read_text().replace("<wbr>", "")
    assert json.loads(slm_fast("tasks", url, "--json").stdout).keys() == {"farm", "sea"}
    assert slm_fast("verify", url).stdout == f"{url}: 2 tasks, all match the manifest\n"
    assert slm_fast("share", url, tmp_path / "shared", "--task", "sea", "--base-model", "a/b").returncode == 0
    assert sorted(Store.open(tmp_path / "shared").files) == ["sea"]


def test_tasks_are_merged_from_a_url_and_its_own_are_preferred_if_it_is_named(url, tmp_path):
    mine, store = tmp_path / "mine", Store.open(tmp_path / "store")
    one = slm_fast("merge", mine, url, "--task", "farm")
    assert one.returncode == 0, one.stderr
    assert Store.open(mine).files == {"farm": store.files["farm"]}
    other = ScalableLM.from_pretrained(mine)
    other.forget("farm")
    other.add(random_task(other, "farm", rank=2))
    one_line(slm_fast("merge", mine, url), 2, "task 'farm': ", f"{mine} and {url} hold different tasks of this name")
    assert slm_fast("merge", mine, url, "--prefer", url).returncode == 0
    assert Store.open(mine).files == store.files


def test_verbs_that_write_refuse_a_url_in_one_line(url, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nfarm1,yes\nfarm2,no\n")
    there, rows = tree(tmp_path / "store"), tmp_path / "rows.csv"
    refused = partial(one_line, status=2)
    for words in (
        ("learn", url, "--task", f"sky={rows}"),
        ("forget", url, "farm"),
        ("merge", url, tmp_path / "store"),
        ("import", url, "--adapter", tmp_path, "--name", "sky", "--examples", rows),
        ("share", tmp_path / "store", url),
        ("serve", tmp_path / "store", "--tasks-from", url, "--admin-key-file", rows),
    ):
        done = slm_fast(*words)
        refused(done)
        assert f"{url}: expected the path of a folder; a store at a URL is only read" in done.stderr
    assert tree(tmp_path / "store") == there
    assert not cache_of(url).exists()


def test_what_is_not_there_is_one_line(url, tmp_path):
    for verb in ("tasks", "verify", "predict", "serve"):
        one_line(slm_fast(verb, f"{url}/nothing"), 2, f"{url}/nothing: not a store (no manifest.json)")
        one_line(slm_fast(verb, "nosuch://a"), 2, "nosuch://a: cannot be opened: Protocol not known: nosuch")
    one_line(slm_fast("merge", tmp_path / "mine", "nosuch://a"), 2, "nosuch://a: cannot be opened")
    assert not (tmp_path / "mine").exists()
    (tmp_path / "store" / "manifest.json").write_text("{")
    one_line(slm_fast("tasks", url), 1, f"{url}/manifest.json: damaged")
