"""Report pages in a real browser: they fit a phone and a wide screen, and make no network requests."""

from __future__ import annotations

import html as markup
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from chrome import Chrome
from made_runs import make_run, write_run
from models import knows, make_slm, random_task, toy_task

from slm_fast.data import Row
from slm_fast.evaluate import mark
from slm_fast.options import PredictOptions
from slm_fast.report import html, report_on, run_report, save

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
WIDTHS = (390, 1280)

# An outer page with one iframe per width. It measures each iframe and writes the results into itself as JSON.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><body>%s<pre id="found"></pre><script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const inside = frame.contentDocument, root = inside.documentElement;
    const wide = [...inside.querySelectorAll("main *")].filter((e) =>
      !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > root.clientWidth + 1);
    return {width: frame.contentWindow.innerWidth, scroll: root.scrollWidth,
            wide: wide.slice(0, 3).map((e) => e.outerHTML.slice(0, 80)),
            requests: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
            height: root.scrollHeight, style: getComputedStyle(inside.querySelector("h1")).fontWeight};
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def look(page: str, folder: Path) -> list[dict]:
    frames = "".join(
        f'<iframe srcdoc="{markup.escape(page)}" style="border:0;width:{width}px;height:800px"></iframe>'
        for width in WIDTHS
    )
    (folder / "probe.html").write_text(PROBE % frames, "utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,900"),
        *(
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=4000",
        ),
        *("--dump-dom", (folder / "probe.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return json.loads(markup.unescape(found[1]))


def fits(page: str, folder: Path) -> None:
    for seen, width in zip(look(page, folder), WIDTHS, strict=True):
        assert seen["width"] == width
        assert seen["wide"] == []
        assert seen["scroll"] <= width
        assert seen["requests"] == []
        assert seen["height"] > 800
        assert seen["style"] == "680"  # its style sheet is applied


def test_a_stores_page_fits_whatever_its_texts_are(tmp_path: Path):
    slm = make_slm("bert")
    knows(slm, *[random_task(slm, topic, topic="sea") for topic in ("a" * 64, "farm", "sea", "sky-" + "x" * 60)])
    tasks = {name: toy_task("sea", rows=6) for name in slm.tasks}
    marked = mark(slm.model, tasks, PredictOptions())
    texts = ("<b>bold</b>", "w" * 2000, "שלום " * 80, "🐟" * 300, "\u202e" + "x" * 50)
    for i, text in enumerate(texts):
        prediction = marked[i].prediction
        object.__setattr__(marked[i], "row", Row(text, "y" * 200))
        object.__setattr__(marked[i], "prediction", prediction)
        object.__setattr__(marked[i], "right", False)
    fits(html(report_on(slm, marked, 1.0, command="slm-fast evaluate " + "/long" * 100)), tmp_path)


def test_a_runs_page_fits_with_long_titles(tmp_path: Path):
    run = make_run(tmp_path / "run", seeds=2)
    write_run(run, machine="m" * 500)
    (run / "slm" / "about.json").write_text(json.dumps({"title": "t" * 200, "told": False}))
    fits(html(run_report([run])), tmp_path)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The file of a run's report, with long titles and an ablation."""
    run = make_run(tmp_path / "run", seeds=2)
    write_run(run, machine="m" * 500)
    shutil.copytree(run / "slm", run / "slm,rank=4,slots=2")
    (run / "slm" / "about.json").write_text(json.dumps({"title": "t" * 200, "told": False}))
    save(run_report([run]), tmp_path / "page.html")
    return tmp_path / "page.html"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_file_itself_fits_the_viewport_and_its_screenshot_is_as_wide(page: Path, tmp_path: Path, width: int):
    assert CHROMIUM is not None
    with Chrome(CHROMIUM, tmp_path) as chrome:
        seen = chrome.look(page, width)
    assert seen.viewport == width
    assert seen.content <= width
    assert seen.wide == []
    assert seen.size[0] == width
    assert seen.size[1] > 800
    assert seen.messages == []
    assert seen.requests == [page.as_uri()]


def test_the_browser_sees_what_is_too_wide_and_what_is_requested(tmp_path: Path):
    assert CHROMIUM is not None
    body = '<main><p style="width:900px">wide</p><img src="other.png"></main><script>console.log("said")</script>'
    page = tmp_path / "page.html"
    page.write_text(f'<!DOCTYPE html><meta name="viewport" content="width=device-width">{body}')
    with Chrome(CHROMIUM, tmp_path) as chrome:
        narrow, wide = chrome.look(page, 390), chrome.look(page, 1280)
    assert narrow.content > 900
    assert len(narrow.wide) == 1
    assert any("said" in message for message in narrow.messages)
    assert (tmp_path / "other.png").as_uri() in narrow.requests
    assert wide.content <= 1280
    assert wide.wide == []
