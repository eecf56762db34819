"""The report page: the same bytes from the same rows, complete without a network, and alive in a browser."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from accuracy_rows import study
from typer.testing import CliRunner

from dashbench.analysis.points import partly_warm
from dashbench.cli import app
from dashbench.store import newest, read_rows, store_files

H200 = Path(__file__).parent.parent / "results" / "nvidia-h200"
WORKLOAD = H200.parent.parent / "suites" / "workloads" / "chat.yaml"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Some committed kernel rows, one as if it had rotated through one copy, and a made-up study."""
    folder = tmp_path_factory.mktemp("rows")
    kept = []
    for file in store_files(H200):
        for row in read_rows(file) if file.name.startswith(("prefill.", "decode.")) else ():
            usual = row["routing"] == "topics" and not row["routing_options"] and row["batch"] == 1
            if usual and row["context"] in (4096, 16384, 65536):
                kept.append(row)
    barely = next(
        r for r in kept if r["method"] == "dash" and r["phase"] == "decode" and r["cache"] == "cold"
    )
    barely["timing"]["copies"] = 1
    accuracy = [r | {"environment_key": kept[0]["environment_key"]} for r in study(30, lengths=(16384,))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept + accuracy))
    return folder


def build(rows, out):
    done = CliRunner().invoke(app, ["report", str(rows), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def page(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    build(rows, out)
    return out


def test_cold_rows_that_were_not_quite_cold_are_counted(rows, page):
    kept = newest(read_rows(rows / "rows.jsonl"))
    warm = [r for r in kept if partly_warm(r)]
    assert len(warm) == 1 and warm[0]["timing"]["copies"] == 1
    assert f"{len(warm)} rows called cold touch less than" in (page / "index.html").read_text()
    enough = warm[0] | {"timing": warm[0]["timing"] | {"copies": 10**6}}
    assert not partly_warm(enough) and not partly_warm(warm[0] | {"cache": "warm"})


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*")) if p.is_file()
    }  # fmt: skip


def test_the_same_rows_give_the_same_bytes(rows, page, tmp_path):
    build(rows, tmp_path)
    assert digests(tmp_path) == digests(page)


def test_the_committed_report_is_what_the_committed_rows_say(tmp_path, monkeypatch):
    """Its tables, byte for byte: they do not depend on the version of matplotlib as figures do."""
    for draw in ("draw_speedups", "draw_overheads", "draw_frontiers"):
        monkeypatch.setattr(f"dashbench.report.build.{draw}", lambda *_: None)
    command = ["report", str(H200), "--out", str(tmp_path), "--workload", str(WORKLOAD)]
    assert CliRunner().invoke(app, command).exit_code == 0
    made, kept = (
        {p.name: p.read_text() for p in (folder / "tables").iterdir()}
        for folder in (tmp_path, H200 / "report")
    )
    assert made == kept, "draw it again with the command in the README"


def test_the_page_needs_no_network_and_holds_everything(page):
    text = (page / "index.html").read_text()
    assert len(text) < 5_000_000
    outside = re.findall(r"""(?:src|href)=["'](?:https?:)?//[^"']+""", text)
    assert not outside and "@import" not in text
    for words in ("Speedup over the best dense", "Accuracy", "Published claims", "Environments", "All rows"):
        assert words in text, words
    names = {p.suffix for p in (page / "figures").iterdir()}
    assert names == {".png", ".svg", ".pdf"}
    assert {p.suffix for p in (page / "tables").iterdir()} == {".csv", ".md", ".tex"}


def test_a_store_without_rows_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "no rows here" in done.output


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [1200, 390], ids=["desk", "phone"])
def test_the_page_renders_in_a_browser(page, tmp_path, width):
    """Tables sort and filter, figures switch, nothing is wider than the window, the console stays silent."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
        problems, requests = [], []
        tab.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: problems.append(str(e)))
        tab.on("request", lambda r: requests.append(r.url))
        tab.goto((page / "index.html").as_uri())
        assert not problems and all(url.startswith(("file:", "data:")) for url in requests)
        assert tab.locator("h1").inner_text().startswith("dashbench")
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
        field = tab.locator("input[placeholder=filter]").first
        table = tab.locator("table").first
        before = table.locator("tbody tr:visible").count()
        field.fill("prefill")
        assert 0 < table.locator("tbody tr:visible").count() < before
        field.fill("")
        first = table.locator("tbody tr:visible").first.inner_text()
        head = table.locator("thead th").nth(1)
        head.click()
        head.click()
        assert table.locator("tbody tr:visible").first.inner_text() != first or before < 2
        assert tab.locator("svg").first.is_visible()
        choice = tab.locator("select").first
        if choice.locator("option").count() > 1:
            drawn = tab.locator("svg").first.inner_html()
            choice.select_option(index=1)
            assert tab.locator("svg").first.inner_html() != drawn
        tab.screenshot(path=str(tmp_path / f"report-{width}.png"), full_page=False)
        browser.close()
    assert (tmp_path / f"report-{width}.png").stat().st_size > 5000


def test_chromium_if_there_agrees_that_the_page_is_html(page):
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    url = (page / "index.html").as_uri()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "<h1" in done.stdout and "dash 75 %" in done.stdout
