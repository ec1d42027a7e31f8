"""Stores at a URL: the cache is updated atomically, whatever the source and other processes do."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import known_implementations
from served import until
from shelf import URL, asked, brought, path_of, whenever
from stores import (
    ABOUT,
    A,
    B,
    C,
    D,
    before_call,
    contents,
    die,
    edit_manifest,
    finish,
    kept,
    start,
    store_of,
    summed_store,
    tree,
    version,
    writer,
)

from slm_fast import InputError, WorkError
from slm_fast.files import locked
from slm_fast.hub import find_store, is_elsewhere
from slm_fast.remote_store import RemoteStore, cache_of
from slm_fast.store import Store


def test_the_cache_becomes_the_store_at_the_url(shelf, cache):
    store_of(shelf, A, B)
    store = find_store(URL)
    assert (store.path, store.files, store.about["config"]) == (cache, Store.open(shelf).files, ABOUT["config"])
    assert contents(store.load()) == contents([A, B])
    assert tree(cache) == tree(shelf)
    assert store.verify() == store.leftovers() == []


def test_a_store_in_memory_a_folder_and_behind_http_are_opened_alike(shelf, tmp_path):
    store_of(shelf, A, B)
    for file in [path for path in shelf.rglob("*") if path.is_file()]:
        fsspec.filesystem("memory").pipe_file(f"/bucket/{file.relative_to(shelf)}", file.read_bytes())
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=shelf.parent)
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        for url in ("memory://bucket", "memory://bucket/", f"file://{shelf}", f"{web}/store"):
            assert brought(url) == contents([A, B])
            assert tree(cache_of(url.rstrip("/"))) == tree(shelf)
        with pytest.raises(InputError, match=rf"^{web}/nothing: not a store \(no manifest.json\)$"):
            find_store(f"{web}/nothing")
        server.shutdown()


def test_a_second_time_nothing_but_the_manifest_is_asked_for(shelf, cache):
    store_of(shelf, A, B)
    brought()
    assert set(asked()) == {"manifest.json", path_of("a", shelf), path_of("b", shelf)}
    manifest = (cache / "manifest.json").stat()
    assert brought() == contents([A, B])
    assert asked() == ["manifest.json"]
    assert (cache / "manifest.json").stat() == manifest


def test_of_another_generation_only_what_is_new_is_asked_for_and_what_is_gone_vanishes(shelf, cache):
    store_of(shelf, A, B)
    brought()
    Store.open(shelf).commit(remove=["a"])
    Store.open(shelf).commit(add=[C])
    asked()
    assert brought() == contents([B, C])
    assert set(asked()) == {"manifest.json", path_of("c", shelf)}
    assert tree(cache) == tree(shelf)


def test_what_is_kept_beside_the_store_forgets_what_is_gone(shelf, cache, monkeypatch):
    monkeypatch.setattr(Store, "unsummed", 1)
    summed_store(shelf, A, B)
    store = find_store(URL)
    store.load()
    total = summed_store(shelf.parent / "other", A, B)._sum.read().total
    store.keep_sum(store.files, lambda: total)
    assert kept(cache).opening.keys() == set(store.files.values())
    Store.open(shelf).commit(remove=["a"])
    brought()
    assert kept(cache).opening.keys() == {Store.open(shelf).files["b"]}
    assert RemoteStore.open(URL).verify() == []


def test_a_store_of_another_model_takes_the_place_of_the_one_before(shelf, cache):
    store_of(shelf, A)
    brought()
    shutil.rmtree(shelf)
    other = Store(shelf, {**ABOUT, "fingerprint": "beef"}, {})
    other.commit(add=[B])
    assert find_store(URL).about["fingerprint"] == "beef"
    assert tree(cache) == tree(shelf)


# Failures


def refused(kind: type[Exception], *said: str) -> None:
    """Check that opening the store at the URL fails with a one-line error that contains `said`."""
    with pytest.raises(kind) as error:
        RemoteStore.open(URL)
    assert "\n" not in str(error.value)
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize("before", [(), (A, B)])
def test_damaged_bytes_are_not_put_in_place(before, shelf, cache):
    store_of(shelf, A, B)
    if before:
        brought()
    Store.open(shelf).commit(add=[C, D])
    file = shelf / path_of("d", shelf)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    for _ in range(2):
        asked()
        refused(WorkError, f"shelf://store/{path_of('d', shelf)}: damaged: SHA-256 is")
        assert not (cache / "tasks" / "d").exists()
        assert version(cache) == contents(before)
    assert [path for path in asked() if path != "manifest.json"] == [path_of("d", shelf)]  # the others are cached
    Store.open(shelf).commit(remove=["c", "d"])
    assert brought() == contents([A, B])
    assert tree(cache) == tree(shelf)


def test_a_manifest_that_changes_while_its_files_are_read_is_read_again(shelf, cache):
    store_of(shelf, A, B)
    changes = [partial(Store.open(shelf).commit, remove=["b"]), partial(Store.open(shelf).commit, add=[C])]
    whenever(lambda path: "tasks/b" in path and changes and [act() for act in (changes.pop(), changes.pop())])
    assert brought() == contents([A, C])
    assert tree(cache) == tree(shelf)


def test_a_file_that_stays_away_is_one_line_and_the_generation_before_stays(shelf, cache):
    store_of(shelf, A)
    brought()
    Store.open(shelf).commit(add=[B])
    there = tree(cache)
    (shelf / path_of("b", shelf)).unlink()
    asked()
    refused(WorkError, f"shelf://store/{path_of('b', shelf)}: the manifest names it, and it is not there; looked 4")
    assert asked().count("manifest.json") == 1 + 4
    assert tree(cache) == there


def test_names_that_lead_out_of_the_store_are_refused(shelf, cache, tmp_path):
    digest = Store.open(store_of(shelf, A).path).files["a"]
    for name, file in (
        ("../../b", f"tasks/../../b/{digest}.safetensors"),
        ("b", "../../../b.safetensors"),
        ("b", f"/tmp/{digest}.safetensors"),
        ("..", f"tasks/../{digest}.safetensors"),
    ):
        entry = {"file": file, "sha256": digest}
        edit_manifest(shelf, lambda manifest, name=name, entry=entry: manifest["tasks"].update({name: entry}))
        asked()
        refused(WorkError, "shelf://store/manifest.json: damaged: tasks")
        assert asked() == ["manifest.json"]
        edit_manifest(shelf, lambda manifest, name=name: manifest["tasks"].pop(name))
    assert not cache.exists()


def test_a_manifest_that_is_none_is_one_line(shelf, cache):
    store_of(shelf, A)
    brought()
    (shelf / "manifest.json").write_text("<html>\nNot found</html>")
    refused(WorkError, "shelf://store/manifest.json: damaged")
    assert version(cache) == contents([A])


def test_what_cannot_be_reached_is_one_line(shelf, cache, monkeypatch):
    refused(InputError, "shelf://store: not a store (no manifest.json)")

    def denied(_: str) -> None:
        raise PermissionError("Access Denied.\nRequest 1")

    store_of(shelf, A)
    whenever(denied)
    refused(WorkError, "shelf://store/manifest.json: cannot be read: Access Denied.")
    whenever(lambda path: denied(path) if "tasks" in path else None)
    refused(WorkError, f"shelf://store/{path_of('a', shelf)}: cannot be read: Access Denied.")
    with pytest.raises(InputError, match=r"^nosuch://store: cannot be opened: Protocol not known: nosuch$"):
        find_store("nosuch://store")
    missing = {"class": "no_such_package.Files", "err": "Install no_such_package to access it"}
    monkeypatch.setitem(known_implementations, "s9", missing)
    with pytest.raises(InputError, match=r"^s9://store: cannot be opened: Install no_such_package to access it$"):
        find_store("s9://store")
    with pytest.raises(InputError, match=r"^revision: goes with a store on the hub"):
        find_store(URL, "main")


def test_a_cache_that_cannot_be_written_is_one_line_that_says_what_names_another(shelf, tmp_path):
    store_of(shelf, A)
    (tmp_path / "cache").write_text("no folder")
    refused(WorkError, str(tmp_path / "cache"), "cannot be brought there", "$SLM_FAST_CACHE names another folder")


def test_a_password_is_not_shown(shelf):
    for password in ("secret", "s@cret", "se:cr@t"):
        url = f"ftp://me:{password}@host/store"
        assert RemoteStore(url, {}, {}).where == "ftp://me:***@host/store"
        for act in (
            Store.open,
            lambda url: find_store(url, "main"),
            lambda url: Store("x", {}, {}).merge([], prefer=url),
        ):
            with pytest.raises(InputError, match=r"ftp://me:\*\*\*@host/store\b"):
                act(url)
    assert [RemoteStore(url, {}, {}).url for url in ("s3://a/b//", "memory://")] == ["s3://a/b", "memory://"]
    for url in ("abfs://box@account.dfs.core.windows.net/store", "http://host:80/a@b", "s3://bucket/a:b@c"):
        assert RemoteStore(url, {}, {}).where == url


def test_the_cache_lies_where_the_user_says(monkeypatch, tmp_path):
    name = cache_of("s3://a/b").name
    assert cache_of("s3://a/c").name != name
    monkeypatch.setenv("SLM_FAST_CACHE", str(tmp_path))
    assert cache_of("s3://a/b") == tmp_path / "stores" / name
    monkeypatch.delenv("SLM_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_of("s3://a/b") == tmp_path / "slm-fast" / "stores" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_of("s3://a/b") == Path.home() / ".cache" / "slm-fast" / "stores" / name


def test_what_is_a_url_and_what_a_folder(shelf):
    assert all(map(is_elsewhere, ("s3://bucket/store", "file:///a", "https://a.b/c")))
    assert not any(map(is_elsewhere, ("store", "/a/b", "./a:b", "a//b", Path("s3://bucket/store"), "://a", "")))


def test_it_is_only_read(shelf, cache):
    store = store_of(shelf, A, B)
    found = find_store(URL)
    there = tree(cache)
    for act in (
        partial(found.commit, add=[C]),
        partial(found.commit, remove=["a"]),
        partial(found.save, [C]),
        partial(found.merge, [store]),
    ):
        with pytest.raises(InputError, match=r"^shelf://store: a store at a URL is only read; save it to a folder$"):
            act()
    for act in (Store.open, Store.exists, lambda url: Store(url, ABOUT, {})):
        with pytest.raises(InputError, match=r"^shelf://store: expected the path of a folder; .* is only read$"):
            act(URL)
    assert tree(cache) == there
    assert tree(shelf) == tree(store.path)


# Concurrent processes


def test_a_reader_beside_finds_the_generation_before_until_all_is_there(shelf, cache):
    store_of(shelf, A, B)
    brought()
    Store.open(shelf).commit(remove=["a"])
    Store.open(shelf).commit(add=[C, D])
    found = []
    asked()
    whenever(lambda path: found.append(version(cache)))
    assert brought() == contents([B, C, D])
    assert found == [contents([A, B])] * len(asked())
    assert len(found) > 2


@pytest.mark.parametrize("before", [(), (A,)])
def test_a_kill_anywhere_leaves_a_whole_store_that_the_next_completes(before, shelf, cache):
    if before:
        store_of(shelf, A)
        brought()
    writer(shelf).commit(add=[C])
    writer(shelf).commit(remove=[task.name for task in before])
    after, kept_before = tree(shelf), shelf.parent / "before"
    if before:
        shutil.copytree(cache, kept_before)
    code, n = -9, 0
    while code != 0:
        n += 1
        shutil.rmtree(cache, ignore_errors=True)
        if before:
            shutil.copytree(kept_before, cache)

        def killed(n: int = n) -> None:
            before_call(n, die)
            RemoteStore.open(URL)

        code, answer = finish(start(killed))
        assert code in (-9, 0), answer
        assert version(cache) in (contents(before), version(shelf))
        if code:
            assert brought() == version(shelf)
        assert tree(cache) == after
    assert answer == "done: None"
    assert n > 20


def held_until(cache: Path, true: Callable[[], bool]) -> tuple[int, int]:
    """Start a process that holds the cache's lock until `true()` holds. Returns once the lock is held."""
    cache.mkdir(parents=True, exist_ok=True)

    def hold() -> None:
        with locked(cache / ".lock", 0) as held:
            assert held
            (cache / "held").write_text("")
            until(true)

    child = start(hold)
    until((cache / "held").exists)
    (cache / "held").unlink()
    return child


def test_two_processes_that_open_it_at_once_bring_each_file_once(shelf, cache, tmp_path):
    store_of(shelf, A, B, C)
    log = tmp_path / "log"
    log.write_text("")

    def noted(path: str) -> None:
        with log.open("a") as file:
            file.write(f"{path}\n")

    whenever(noted)
    holder = held_until(cache, lambda: log.read_text().count("manifest") == 2)  # both have found the cache out of date
    children = [start(lambda: sorted(brought())) for _ in range(2)]
    assert finish(holder) == (0, "done: None")
    assert [finish(child) for child in children] == [(0, "done: ['a', 'b', 'c']")] * 2
    assert sorted(line for line in log.read_text().splitlines() if "manifest" not in line) == sorted(
        f"store/{path_of(name, shelf)}" for name in "abc"
    )
    assert tree(cache) == tree(shelf)


def test_a_process_that_waited_does_not_take_back_what_is_newer(shelf, cache, tmp_path):
    store_of(shelf, A)
    begun, newer = tmp_path / "begun", tmp_path / "newer"
    holder = held_until(cache, newer.exists)
    whenever(lambda path: begun.write_text(""))
    child = start(lambda: sorted(brought()))
    until(begun.exists)
    Store.open(shelf).commit(add=[B])
    newer.write_text("")
    assert finish(holder) == (0, "done: None")
    assert finish(child) == (0, "done: ['a', 'b']")
    assert json.loads((cache / "manifest.json").read_text())["tasks"].keys() == {"a", "b"}
