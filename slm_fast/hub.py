"""Stores on the Hugging Face hub, and folders for sharing: a store of selected tasks with a model card."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_fast import __version__
from slm_fast.card import base_model_of, model_card
from slm_fast.errors import InputError, WorkError, one_line, some_of, warn
from slm_fast.files import is_url, path_of, shown, write
from slm_fast.remote_store import RemoteStore
from slm_fast.store import Store
from slm_fast.store_view import LEAVE_OUT, LOCK, MANIFEST, RESERVE
from slm_fast.tasks import LearnedTask

CARD = "README.md"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class HubStore(Store):
    """A store in the hub's cache, where nothing is changed: no error advises to forget a damaged task."""

    @staticmethod
    def remedy(file: Path) -> str:
        return LEAVE_OUT


def chosen(tasks: Sequence[LearnedTask], names: str | Collection[str] | None) -> list[LearnedTask]:
    """The tasks with these names (None: all), by name. Raises InputError if one does not exist or there are none."""
    try:
        wanted = {names} if isinstance(names, str) else None if names is None else set(names)
    except TypeError:
        raise InputError(f"tasks: expected a name, or several, got {names!r}") from None
    known = {task.name: task for task in tasks}
    for name in sorted(wanted or (), key=str):
        if name not in known:
            raise InputError(f"task {name!r}: not learned; tasks: {some_of(known)}")
    found = [known[name] for name in sorted(known if wanted is None else wanted)]
    if not found:
        raise InputError("tasks: there are none to share")
    return found


def write_shared(
    folder: str | Path,
    about: Mapping[str, Any],
    tasks: Sequence[LearnedTask],
    *,
    accuracy: Mapping[str, float] | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
) -> None:
    """Write a folder for sharing: an ordinary store of these tasks, and its model card, README.md.

    Args:
        folder: output folder. Must be empty or not exist.
        base_model: the backbone's hub name, if its own name is not one.
        about, tasks, accuracy, repo_id: as for `model_card`.

    Raises:
        InputError: the folder is not empty.
        WorkError: it cannot be written.
    """
    path, base = path_of(folder), base_model_of(about, base_model)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already exists; expected an empty folder, or a path that does not exist")
    name = str(base_model or about["backbone"])
    if base is None:  # a path would reveal details of this machine and be useless elsewhere
        name = Path(name).name
        warn(
            f"backbone {name!r}: a folder here, or without a name; base_model= (--base-model) says what it is elsewhere"
        )
    about = {**about, "backbone": name}
    Store(path, about, {}).save(tasks)
    try:
        for file in (LOCK, RESERVE):  # the next writer recreates them
            (path / file).unlink(missing_ok=True)
        card = model_card(about, tasks, accuracy=accuracy, base_model=base, repo_id=repo_id)
        write(path / CARD, card.encode())
    except OSError as error:
        raise WorkError(f"{path}: cannot be written: {error.strerror}") from None


def check_repo(repo_id: str) -> None:
    """Raise InputError if `repo_id` is not a valid repository name."""
    if not isinstance(repo_id, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", repo_id):
        raise InputError(f"repo_id: expected a name such as user/store, got {repo_id!r}")


def push(folder: Path, repo_id: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Upload the store in a folder to a hub repository, which is created if needed, and return its URL. Its tasks that
    the folder lacks are removed from the new version.

    Raises WorkError if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="slm-fast", library_version=__version__)
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            delete_patterns=["tasks/*"],
            commit_message=message or "Upload a store of slm_fast",
        )
        return str(made)
    except Exception as error:  # whatever the hub's client raises for a name, a network, a permission
        raise WorkError(f"{repo_id}: cannot be pushed to the hub: {one_line(error)}") from None


def is_on_hub(path: str | Path) -> bool:
    """Whether a store's path can only be a name on the hub: USER/REPO, if there is no such folder."""
    return (
        isinstance(path, str)
        and HUB_NAME.fullmatch(path) is not None
        and not os.path.exists(path)
        and not os.path.isdir(os.path.dirname(path))
    )


def is_elsewhere(path: str | Path) -> bool:
    """Whether a store's path is a URL or a name on the hub rather than a folder."""
    return is_url(path) or is_on_hub(path)


def find_store(path: str | Path, revision: str | None = None) -> Store:
    """Open a store in a folder, at a URL or on the hub. The latter two are downloaded and must only be read.

    Raises:
        InputError: there is none, or the hub cannot be reached.
        WorkError: its manifest is damaged.
    """
    if not is_on_hub(path):
        if revision is not None:
            raise InputError(f"revision: goes with a store on the hub, got {revision!r} and {shown(path)}")
        return RemoteStore.open(path) if is_url(path) else Store.open(path)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(str(path), revision=revision, allow_patterns=[MANIFEST, "tasks/*"])
    except Exception as error:  # whatever the hub's client raises for a name, a network, a permission
        raise InputError(
            f"store {path}: no such folder, and cannot be downloaded from the hub: {one_line(error)}"
        ) from None
    if not (Path(folder) / MANIFEST).exists():
        raise InputError(f"store {path}: the hub's repository of this name holds no store (no {MANIFEST})")
    return HubStore.open(folder)
