"""The local cache of a store at a URL: missing or damaged files are downloaded again."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
from models import make_slm, random_task, reopened
from shelf import URL, asked, brought, path_of
from stores import A, B, contents, store_of, tree

from slm_fast import WorkError
from slm_fast.errors import SlmWarning
from slm_fast.files import locked
from slm_fast.remote_store import RemoteStore, cache_of
from slm_fast.store import Store


def test_a_file_that_the_cache_has_lost_is_brought_again(shelf, cache):
    store_of(shelf, A, B)
    brought()
    (cache / path_of("a", shelf)).unlink()
    assert brought() == contents([A, B])
    shutil.rmtree(cache)
    assert brought() == contents([A, B])


@pytest.mark.parametrize("manifest", [b"", b"{", b'{"format": 2}', b"\xff\xfe"])
def test_a_manifest_that_is_damaged_in_the_cache_is_brought_again(manifest, shelf, cache):
    store_of(shelf, A, B)
    brought()
    (cache / "manifest.json").write_bytes(manifest)
    assert brought() == contents([A, B])
    assert tree(cache) == tree(shelf)


def spoiled(file: Path) -> bytes:
    """Flip a bit of the file's last byte. Returns the original content."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return data


def test_a_file_that_is_damaged_in_the_cache_is_brought_again(shelf, cache):
    store_of(shelf, A, B)
    brought()
    spoiled(cache / path_of("a", shelf))
    asked()
    with pytest.warns(SlmWarning, match=r"damaged: SHA-256 is .*; downloading it again$"):
        assert brought() == contents([A, B])
    assert asked() == ["manifest.json", path_of("a", shelf)]
    assert tree(cache) == tree(shelf)
    spoiled(cache / path_of("b", shelf))
    with pytest.warns(SlmWarning, match="downloading it again"):
        assert RemoteStore.open(URL).verify() == []


def test_two_processes_that_find_the_same_file_damaged_both_read_it(shelf, cache, monkeypatch):
    store_of(shelf, A, B)
    brought()
    one, two = RemoteStore.open(URL), RemoteStore.open(URL)
    spoiled(cache / path_of("a", shelf))
    flushing, found = Store._flush_placed, []

    def flush_placed(store: Store) -> None:
        monkeypatch.setattr(Store, "_flush_placed", flushing)
        found.append(contents(two.load()))  # while the first is about to put the file in its place
        flushing(store)

    monkeypatch.setattr(Store, "_flush_placed", flush_placed)
    with pytest.warns(SlmWarning, match="downloading it again"):
        assert contents(one.load()) == contents([A, B])
    assert found == [contents([A, B])]
    assert RemoteStore.open(URL).leftovers() == []
    assert tree(cache) == tree(shelf)


def test_a_damaged_file_that_cannot_be_replaced_yet_is_used_as_downloaded(shelf, cache, monkeypatch):
    monkeypatch.setattr("slm_fast.remote_store.PATIENCE", 0.0)
    store_of(shelf, A, B)
    brought()
    store, lost = RemoteStore.open(URL), cache / path_of("a", shelf)
    spoiled(lost)
    damaged = lost.read_bytes()
    with locked(cache / ".lock", 0), pytest.warns(SlmWarning, match="downloading it again"):
        found = store.load()
    assert lost.read_bytes() == damaged
    assert contents(found) == contents([A, B])
    with pytest.warns(SlmWarning, match="downloading it again"):
        assert contents(store.load()) == contents([A, B])
    assert tree(cache) == tree(shelf)


def test_a_damaged_file_of_a_task_that_the_cache_has_since_forgotten_is_not_put_back(shelf, cache):
    store_of(shelf, A, B)
    brought()
    store = RemoteStore.open(URL)
    spoiled(cache / path_of("a", shelf))
    Store.open(cache).commit(remove=["a"])  # as another process does that brings the URL's next generation
    with pytest.warns(SlmWarning, match="downloading it again"):
        assert store.read("a")[0].name == "a"
    assert Store.open(cache).leftovers() == []
    assert not (cache / "tasks" / "a").exists()


def test_a_damaged_file_is_said_to_be_so_where_the_url_has_none_either(shelf, cache):
    store_of(shelf, A)
    brought()
    store, lost = RemoteStore.open(URL), path_of("a", shelf)
    spoiled(cache / lost)
    for spoil in (spoiled, Path.unlink):
        spoil(shelf / lost)
        with pytest.raises(WorkError, match=rf"^{cache / lost}: damaged: SHA-256 is") as caught:
            store.load()
        assert str(caught.value).endswith("; --skip-damaged (skip_damaged=True) opens the store without it")


def test_damage_that_is_found_when_a_part_is_used_is_mended_by_the_next_opening(shelf, cache):
    slm = make_slm("bert", features=32)
    slm.save_pretrained(shelf)
    slm.add([random_task(slm, name) for name in ("city", "sea")])
    reopened(URL)  # saves the headers of all tasks' files in .keys
    lost = path_of("sea", shelf)
    data = spoiled(cache / lost)
    other = reopened(URL)
    with pytest.raises(WorkError, match=r"damaged: SHA-256 is .*; reopening the store downloads it again$"):
        other.model.router.parts[1]["factor"]
    assert not (cache / lost).exists()
    reopened(URL)
    with pytest.raises(WorkError, match="damaged"):
        other.model.router.parts[1]["factor"]  # a process that opened the damaged file does not delete its replacement
    assert (cache / lost).read_bytes() == data


def test_what_two_endpoints_have_under_one_name_is_kept_apart(cache, monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {})
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    found = [cache_of("s3://bucket/store")]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one:9000")
    found.append(cache_of("s3://bucket/store"))
    assert cache_of(URL) == cache
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two:9000")
    found.append(cache_of("s3://bucket/store"))
    fsspec.config.conf["s3"] = {"client_kwargs": {"endpoint_url": "http://three:9000"}}
    found.append(cache_of("s3://bucket/store"))
    fsspec.config.conf["s3"] = {"endpoint_url": "http://one:9000"}
    assert cache_of("s3://bucket/store") == found[1]
    assert len(set(found)) == 4
