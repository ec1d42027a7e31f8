"""`slm-fast serve`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from slm_fast.cli.arguments import (
    Verbs,
    add_device_options,
    add_memory_option,
    add_routing_options,
    fields_of,
    open_store,
)
from slm_fast.errors import InputError
from slm_fast.options import PredictOptions

KEY, ADMIN_KEY = "SLM_FAST_API_KEY", "SLM_FAST_ADMIN_KEY"
LIMITS = {
    "queue_rows": "rows in the queue; further requests get 429",
    "queue_tokens": "tokens in the queue (default: 64 batches)",
    "batch_tokens": "tokens per batch, including padding (default: 1/8 of what waits, at least what takes 0.08 s)",
    "batch_rows": "texts generated concurrently (default: 64, or what an eighth of the free memory holds)",
    "max_new_tokens": "the most max_tokens that a request may ask for, and its value if not given",
    "deadline": "seconds until an unanswered request gets 504",
    "requests": "concurrent requests; further ones get 429",
    "inputs": "texts per request",
    "body": "bytes per request body",
    "patience": "seconds that a client may take to send a request or to read a chunk of the answer",
    "poll": "seconds between checks for store changes (default: 0.5, or 5 for a URL)",
    "drain": "seconds to keep listening after SIGTERM",
}


def add(verbs: Verbs) -> None:
    from slm_fast.server.options import ServeOptions

    serve = verbs.add("serve", run, "serve a store over HTTP: OpenAI's API, classification, and a test page")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    serve.add_argument("--port", type=int, default=8000, help="0 picks a free port")
    about = f"API key, the first line of this file (Authorization: Bearer KEY); or set ${KEY}"
    serve.add_argument("--key-file", type=Path, metavar="FILE", help=about)
    about = f"admin key; enables /v1/tasks; or set ${ADMIN_KEY}"
    serve.add_argument("--admin-key-file", type=Path, metavar="FILE", help=about)
    serve.add_argument("--tasks-from", metavar="STORE", help="store from which POST /v1/tasks adds tasks")
    add_device_options(serve, "auto")
    add_memory_option(serve)
    add_routing_options(serve)
    limits = serve.add_argument_group("limits")
    for name, about in LIMITS.items():
        default = getattr(ServeOptions, name)
        kind = float if name == "poll" or isinstance(default, float) else int
        limits.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=about)


def run(arguments: argparse.Namespace) -> int:
    try:
        from slm_fast.server import run as server
        from slm_fast.server.options import ServeOptions
    except ImportError as error:
        raise InputError(f"slm-fast serve: {error.name} is missing; pip install 'slm-fast[serve]'") from None
    from slm_fast.files import is_url
    from slm_fast.hub import find_store
    from slm_fast.store import Store

    options = PredictOptions(**{name: getattr(arguments, name) for name in ("head", "abstain", "distance")})
    limits = ServeOptions(**fields_of(arguments, ServeOptions))
    key, admin = _key(arguments.key_file, KEY), _key(arguments.admin_key_file, ADMIN_KEY)
    if admin is not None and admin == key:
        own = f"${ADMIN_KEY}" if arguments.admin_key_file is None else f"--admin-key-file {arguments.admin_key_file}"
        other = f"${KEY}" if arguments.key_file is None else f"--key-file {arguments.key_file}"
        raise InputError(f"{own}: expected another key than {other}")
    if arguments.tasks_from is not None and admin is None:
        raise InputError("--tasks-from: goes with --admin-key-file")
    source = None if arguments.tasks_from is None else Store.open(arguments.tasks_from)
    if is_url(arguments.store):
        find_store(arguments.store)
    else:
        Store.open(arguments.store)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the store is about to be read anyway
    sock = server.bound(arguments.host, arguments.port)
    with sock:
        server.log_to(sys.stderr)
        slm = open_store(arguments, for_another_thread=True)
        keys = {"key": key, "admin": admin}
        served = server.made(slm, options, limits, **keys, source=source, skip_damaged=arguments.skip_damaged)
        server.serve(served, sock)
    return 0


def _key(file: Path | None, variable: str) -> str | None:
    """Read a key from the first line of a file or from the environment, since other users can see command lines."""
    if file is None:
        key = os.environ.get(variable)
        if key is not None and not key.strip():
            raise InputError(f"${variable}: expected a key, got none; unset it to serve without one")
        return key and key.strip()
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as a key: {error}") from None
    if not lines or not lines[0].strip():
        raise InputError(f"{file}: expected a key in its first line")
    return lines[0].strip()
