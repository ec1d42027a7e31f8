"""`slm-fast serve`."""

from __future__ import annotations

import argparse
import os
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
    "queue_rows": "rows that are admitted and not answered yet; beyond them requests get 429",
    "queue_tokens": "their tokens; default: 64 batches",
    "batch_tokens": "tokens of a batch, padding included; default: what suits the device",
    "batch_rows": "texts that are written at once",
    "max_new_tokens": "the most that a request may ask for, and what it gets unless it says less",
    "deadline": "seconds after which a request that is not answered gets 504",
    "requests": "concurrent requests; more get 429",
    "inputs": "texts of a request",
    "body": "bytes of a request",
    "patience": "seconds that a client may take to send a request, or to read a part of its answer",
    "poll": "seconds between two looks at the store; default: 0.5, or 5 of one at a URL",
    "drain": "seconds between SIGTERM and the end of listening",
}


def add(verbs: Verbs) -> None:
    from slm_fast.server.options import ServeOptions

    serve = verbs.add("serve", run, "answer over HTTP: OpenAI's API, classification, and a page to try it")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 listens on all addresses")
    serve.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    about = f"a file whose first line clients have to know (Authorization: Bearer KEY), or ${KEY}"
    serve.add_argument("--key-file", type=Path, metavar="FILE", help=about)
    about = f"turns on /v1/tasks, which asks for this second key, or ${ADMIN_KEY}"
    serve.add_argument("--admin-key-file", type=Path, metavar="FILE", help=about)
    serve.add_argument("--tasks-from", metavar="STORE", help="where POST /v1/tasks takes tasks from")
    add_device_options(serve, "auto")
    add_memory_option(serve)
    add_routing_options(serve)
    limits = serve.add_argument_group("how much is taken at once")
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
        raise InputError(f"${ADMIN_KEY}: expected another key than ${KEY}")
    if arguments.tasks_from is not None and admin is None:
        raise InputError("--tasks-from: goes with --admin-key-file")
    source = None if arguments.tasks_from is None else Store.open(arguments.tasks_from)
    if is_url(arguments.store):
        find_store(arguments.store)
    else:
        Store.open(arguments.store)
    sock = server.bound(arguments.host, arguments.port)
    with sock:
        server.log_to(sys.stderr)
        slm = open_store(arguments)
        keys = {"key": key, "admin": admin}
        served = server.made(slm, options, limits, **keys, source=source, skip_damaged=arguments.skip_damaged)
        server.serve(served, sock)
    return 0


def _key(file: Path | None, variable: str) -> str | None:
    """A key from the first line of a file, or from the environment: what stands in a call, others can read."""
    if file is None:
        return os.environ.get(variable) or None
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as a key: {error}") from None
    if not lines or not lines[0].strip():
        raise InputError(f"{file}: expected a key in its first line")
    return lines[0].strip()
