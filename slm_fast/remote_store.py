"""A read-only store at a URL (s3://, gs://, https://, file:// or any other that fsspec has a driver for).

The files that its manifest names are downloaded to a folder in the user's cache, which is an ordinary store. Existing
files are kept, others are checked against their SHA-256 before they are put in place, and the manifest changes last. So
a reader of the cache finds either the previous generation or the new one, whatever the source, the network and other
processes do.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slm_fast.errors import InputError, SlmError, WorkError, one_line, warn
from slm_fast.files import locked, shown
from slm_fast.schema import check_manifest, check_same, task_path
from slm_fast.store import Store
from slm_fast.store_view import LEAVE_OUT, LOCK, MANIFEST
from slm_fast.task_file import check_digest

CACHE = "SLM_FAST_CACHE"
ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "s3a": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
    "gcs": ("STORAGE_EMULATOR_HOST",),
}
PATIENCE = 1.0  # seconds that a reader waits for the cache's lock to replace a damaged file
TOGETHER = 8  # files requested at once, and then in memory together


def cache_of(url: str) -> Path:
    """The folder to which a URL's store is downloaded: in $SLM_FAST_CACHE, or else in the user's cache directory."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get(CACHE) or os.path.join(caches, "slm-fast")
    source = f"{url} {endpoint}" if (endpoint := endpoint_of(url)) else url
    return Path(os.path.expanduser(root), "stores", hashlib.sha256(source.encode()).hexdigest()[:32])


def endpoint_of(url: str) -> str:
    """The endpoint for a URL's buckets, if configured in fsspec or the environment: elsewhere the same name may mean
    another store."""
    from fsspec.config import conf

    protocol = url.split("://", 1)[0]
    said = conf.get(protocol) or {}
    found = [said.get("endpoint_url"), (said.get("client_kwargs") or {}).get("endpoint_url")]
    return next(filter(None, [*found, *map(os.environ.get, ENDPOINTS.get(protocol, ()))]), "")


class Gone(Exception):
    """A file does not exist. The argument is its path in the store."""


class RemoteStore(Store):
    """The store at a URL. `path` is its folder in the cache, which `bring` updates.

    As in any store, `.sum` and `.keys` are kept there; tasks are not added or removed.
    """

    poll = 5.0
    tries, pause = 4, 0.25  # attempts if files that a manifest names are missing, and seconds in between

    def __init__(self, url: str | Path, about: Mapping[str, Any], files: Mapping[str, str]) -> None:
        self.url, self._model = re.sub(r"(?<=[^:/])/+$", "", str(url)), dict(about)
        super().__init__(cache_of(self.url), about, files)

    @classmethod
    def open(cls, path: str | Path) -> RemoteStore:
        """Download the store at a URL, and open it.

        Raises:
            InputError: there is none, or no driver for the URL.
            WorkError: it cannot be read or is damaged, or the cache cannot be written.
        """
        store = cls(path, {}, {})
        store.bring()
        store._model = store.about = store._look_anew()
        return store

    def again(self) -> RemoteStore:
        return RemoteStore(self.url, self.about, self.files)

    @property
    def where(self) -> str:
        """The URL for messages, without a password."""
        return shown(self.url)

    def glance(self) -> object:
        try:
            return hashlib.sha256(self._manifest_bytes()).digest()
        except SlmError as error:
            return str(error)

    def stamp(self, name: str) -> None:
        """Nothing: a file that the cache has lost is downloaded again."""

    def _bytes(self, name: str) -> bytes:
        """As in any store, but a file that the cache has lost, or that is damaged, is downloaded again."""
        digest = self.files[name]
        self._elsewhere.discard(digest)
        try:
            return super()._bytes(name)
        except WorkError as error:
            path = task_path(name, digest)
            try:
                data = self._read([path])[0]
                check_digest(data, digest, f"{self.where}/{path}")
            except (Gone, SlmError):
                raise error from None
            warn(f"{error}; downloading it again")
            self._elsewhere.add(digest)
            with suppress(SlmError):  # the cache cannot be written, or the lock is held, perhaps by this reader
                cache = Store.open(self.path)
                with cache._writing(PATIENCE):
                    if cache.files.get(name) == digest:
                        cache._place(name, digest, data)
                        cache._flush_placed()
                        self._elsewhere.discard(digest)
            return data

    @staticmethod
    def remedy(file: Path) -> str:
        return LEAVE_OUT

    @classmethod
    def on_damage(cls, file: Path) -> str:
        """Delete a damaged file from the cache: the next opening downloads it again."""
        with suppress(OSError):
            file.unlink()
        return "; reopening the store downloads it again"

    def bring(self) -> None:
        """Update the cache to what the URL has now, if it differs. Raises as `open` does, and InputError if the store
        is now of another model; the cache then keeps the previous generation."""
        if self._holds(*self._manifest()):
            return
        failed: SlmError | None = None
        with super()._writing(600.0):  # long enough for another process to download it
            try:
                about, files = self._fetch()
            except SlmError as error:  # files in place stay, so that the next attempt requests the rest
                failed, self._clean = error, False
            else:
                self._take_out(files, None)
                self.about = about
                self._finish(files)
        if failed is not None:
            raise failed

    def _holds(self, about: Mapping[str, Any], files: Mapping[str, str]) -> bool:
        """Whether the cache has everything that the manifest names, and nothing else."""
        try:
            there = Store.open(self.path)
        except InputError:  # no store
            return False
        except WorkError:
            self._drop_damaged()
            return False
        if (there.about, there.files) != (about, files):
            return False
        try:
            return all(there.file(name).exists() for name in files) and not there.leftovers()
        except OSError:  # another process removes leftovers
            return False

    def _drop_damaged(self) -> None:
        """Remove a manifest that cannot be read from the cache."""
        with self._named_errors(), locked(self.path / LOCK, 600.0) as held, suppress(InputError):  # already dropped
            try:
                Store.open(self.path)
            except WorkError:
                if held:
                    (self.path / MANIFEST).unlink()

    def _fetch(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The manifest's content, once all files that it names are in place."""
        for _ in range(self.tries):
            about, files = self._manifest()
            paths = {name: task_path(name, digest) for name, digest in sorted(files.items())}
            missing = [name for name, path in paths.items() if not (self.path / path).exists()]
            try:
                for at in range(0, len(missing), TOGETHER):
                    some = missing[at : at + TOGETHER]
                    for name, data in zip(some, self._read([paths[name] for name in some]), strict=True):
                        check_digest(data, files[name], f"{self.where}/{paths[name]}")
                        self._place(name, files[name], data)
                return about, files
            except Gone as gone:  # another process has committed since
                says = f"the manifest names it, and it is not there; looked {self.tries} times"
                lost = WorkError(f"{self.where}/{gone}: {says}")
            finally:
                self._flush_placed()  # what has come stays
            time.sleep(self.pause)
        raise lost

    def _manifest(self) -> tuple[dict[str, Any], dict[str, str]]:
        about, files = check_manifest(self._manifest_bytes(), f"{self.where}/{MANIFEST}")
        if self._model:
            check_same(about, self._model, self.where, "the store that was opened")
        return about, files

    def _manifest_bytes(self) -> bytes:
        try:
            return self._read([MANIFEST])[0]
        except Gone:
            raise InputError(f"{self.where}: not a store (no {MANIFEST})") from None

    def _read(self, paths: list[str]) -> list[bytes]:
        """Contents of files at the URL. Raises Gone, InputError or WorkError for the first that fails."""
        try:
            from fsspec.core import url_to_fs

            system, root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # the error says what to install
            raise InputError(f"{self.where}: cannot be opened: {one_line(error)}") from None
        except Exception as error:  # whatever a driver raises for missing settings
            raise WorkError(f"{self.where}: cannot be opened: {one_line(error)}") from None
        try:
            system.invalidate_cache()
            found = system.cat_ranges([f"{root.rstrip('/')}/{path}" for path in paths], None, None, on_error="return")
        except Exception as error:
            found = [error] * len(paths)
        for path, data in zip(paths, found, strict=True):
            if isinstance(data, (FileNotFoundError, NotADirectoryError)):
                raise Gone(path)
            if isinstance(data, BaseException):  # whatever a driver raises for network or permission errors
                raise WorkError(f"{self.where}/{path}: cannot be read: {one_line(data)}")
        return found

    # Writing the cache

    def _check_free(self) -> None:
        """The cache may have lost its manifest: files that are in place are used again, or removed."""

    @contextmanager
    def _writing(self, patience: float | None = None) -> Iterator[None]:
        if patience is None:
            raise InputError(f"{self.where}: a store at a URL is only read; save it to a folder")
        with super()._writing(patience):
            yield

    def _joined(self, about: dict[str, Any]) -> dict[str, Any]:
        return about  # whatever model the cached store was of

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            says = f"the store cannot be brought there: {error.strerror}; ${CACHE} names another folder"
            raise WorkError(f"{self.path}: {says}") from None
