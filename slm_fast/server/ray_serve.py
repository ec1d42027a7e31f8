"""The server as a Ray Serve deployment: replicas of its application behind Serve's proxy.

from ray import serve
from slm_fast.server.ray_serve import application

serve.run(application("my-store", replicas=2))
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from ray import serve

from slm_fast.collection import settle
from slm_fast.errors import one_line
from slm_fast.files import is_url
from slm_fast.hub import find_store
from slm_fast.loading import located
from slm_fast.options import PredictOptions
from slm_fast.server.app import create_app, guarded
from slm_fast.server.limits import App
from slm_fast.server.options import ServeOptions
from slm_fast.server.run import made
from slm_fast.slm import ScalableLM
from slm_fast.surroundings import in_one_thread


class Server:
    """A replica: engine, store watcher and routes, without a socket. Construction ends once it is warm.

    Args:
        store: its folder or URL.
        opening: keyword arguments of `ScalableLM.from_pretrained`.
        threads: CPU threads.
    """

    def __init__(
        self,
        store: str,
        opening: dict[str, Any],
        threads: int,
        options: PredictOptions,
        limits: ServeOptions,
        key: str | None,
    ) -> None:
        torch.set_num_threads(threads)
        with in_one_thread():
            slm = ScalableLM.from_pretrained(store, **opening)
        self.served = made(slm, options, limits, key=key)
        settle()
        self.served.engine.start()
        self.served.watcher.start()
        self.served.engine.warm.wait()

    def __serve_build_asgi_app__(self) -> App:
        return guarded(create_app(self.served), self.served)

    def check_health(self) -> None:
        """Raise if the engine has failed, so that Serve restarts the replica."""
        if self.served.engine.failed is not None:
            raise RuntimeError(f"the engine failed: {one_line(self.served.engine.failed)}")


def application(
    store: str | Path,
    options: PredictOptions | None = None,
    limits: ServeOptions | None = None,
    *,
    replicas: int = 1,
    threads: int = 1,
    gpus: float = 0,
    key: str | None = None,
    backbone: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> serve.Application:
    """The server of a store, for `ray.serve.run`.

    Args:
        store: a folder that all nodes see under this path, or a URL.
        options: `head`, `abstain` and `distance`.
        limits: limits of each replica.
        replicas: number of replicas, with a model each.
        threads, gpus: CPU threads and GPUs per replica.
        key: API key that clients must send (Authorization: Bearer KEY).
        backbone, dtype, device: as for `ScalableLM.from_pretrained`.

    Raises:
        InputError: there is no store.
    """
    limits = limits or ServeOptions()
    path = str(store) if is_url(store) else os.path.abspath(os.path.expanduser(store))
    find_store(path)
    deployment = serve.deployment(
        name="slm_fast",
        num_replicas=replicas,
        max_ongoing_requests=2 * limits.requests,  # so that replicas say themselves what they refuse
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
    )(serve.ingress()(Server))
    opening = {"backbone": None if backbone is None else located(backbone), "dtype": dtype, "device": device}
    return deployment.bind(path, opening, threads, options or PredictOptions(), limits, key)
