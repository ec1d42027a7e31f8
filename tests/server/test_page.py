"""The page at / in a real browser: it fits a phone and a wide screen, and makes requests to its own server only."""

from __future__ import annotations

import html as markup
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from models import FAR
from served import serving, store_with

from slm_fast.options import PredictOptions
from slm_fast.server import limits, run
from slm_fast.server.app import Served, create_app

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
WIDTHS = (390, 1280)
TEXTS = [
    "sea1 sea2 sea3 good1 good2",
    "farm1 farm2 farm5 bad1 bad2 farm7 " + "farm3-" * 60,
    "<b>sea4</b> sea5 bad2",
    FAR,
]

PROBE = """<!DOCTYPE html><meta charset="utf-8"><body>%s<pre id="found"></pre><script>
addEventListener("load", async () => {
  const frames = [...document.querySelectorAll("iframe")];
  const inside = (frame) => frame.contentDocument;
  for (let i = 0; i < 200 && !frames.every((f) => inside(f).querySelector("#time, .wrong")); i++)
    await new Promise((done) => setTimeout(done, 50));
  document.getElementById("found").textContent = JSON.stringify(frames.map((frame) => ({
    width: frame.contentWindow.innerWidth, scroll: inside(frame).documentElement.scrollWidth,
    cards: [...inside(frame).querySelectorAll("article")].map((card) => ({
      said: card.querySelector(".said").textContent, answer: card.querySelector(".answer").textContent,
      lists: [...card.querySelectorAll("h2")].map((h) => h.textContent), bold: card.querySelectorAll("b").length,
      shares: [...card.querySelectorAll("dl:last-of-type dt")].map((e) => e.textContent)})),
    time: inside(frame).querySelector("#time")?.textContent, wrong: inside(frame).querySelector(".wrong")?.textContent,
    state: inside(frame).getElementById("state").textContent, keys: !inside(frame).getElementById("keys").hidden,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name)})));
});
</script>"""


def browse(url: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder / 'profile'}"),
        *("--virtual-time-budget=8000", *more, url),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done


def look(url: str, folder: Path) -> list[dict[str, Any]]:
    done = browse(f"{url}/health/probe", folder, "--window-size=1800,900", "--dump-dom")
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return json.loads(markup.unescape(found[1]))


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> str:
    """Adds a page to servers that loads / at each width and reports what it shows. Returns the path with TEXTS."""
    path = "/#" + urlencode({"text": TEXTS}, doseq=True)
    style = "border:0;height:800px;width:"
    frames = [f'<iframe src="{markup.escape(path)}" style="{style}{width}px"></iframe>' for width in WIDTHS]

    def with_probe(served: Served) -> FastAPI:
        app = create_app(served)
        app.get("/health/probe", response_class=HTMLResponse)(lambda: PROBE % "".join(frames))
        return app

    monkeypatch.setattr(run, "create_app", with_probe)
    monkeypatch.setattr(limits, "OPEN", (*limits.OPEN, "/health/probe"))
    return path


@needs_chromium
def test_texts_typed_on_a_phone_and_a_wide_screen_show_task_label_and_weights(probed: str, tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store")
    with serving(slm, options=PredictOptions(abstain=True)) as (client, _):
        frames = look(client.url, tmp_path)
        shot = tmp_path / "page.png"
        browse(client.url + probed, tmp_path, "--window-size=390,900", f"--screenshot={shot}", "--hide-scrollbars")
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 5_000
    for frame, width in zip(frames, WIDTHS, strict=True):
        assert frame["width"] == width
        assert frame["scroll"] <= width
        assert [card["said"] for card in frame["cards"]] == TEXTS
        for card, answer in zip(frame["cards"], slm.predict(TEXTS, abstain=True), strict=True):
            assert card["answer"] == ("no matching task" if answer.task is None else f"{answer.label} · {answer.task}")
        assert frame["cards"][0]["lists"] == ["probability", "routing weights"]
        assert frame["cards"][0]["shares"][0] == "sea"
        assert frame["cards"][2]["bold"] == 0  # input is shown as text, not markup
        assert frame["cards"][3]["answer"] == "no matching task"
        assert re.match(r"4 texts in \d+ ms", frame["time"])
        assert frame["state"].startswith("ready, 2 tasks, generation ")
        assert frame["requests"]
        assert all(request.startswith(client.url) for request in frame["requests"])


@needs_chromium
def test_a_page_whose_server_has_a_key_asks_for_it(probed: str, tmp_path: Path) -> None:
    with serving(store_with(tmp_path / "store"), key="secret") as (client, _):
        for frame in look(client.url, tmp_path):
            assert frame["keys"]
            assert frame["wrong"].startswith("no key")
            assert frame["cards"] == []
