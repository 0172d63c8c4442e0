"""The site: built without a warning, whole without a network, and refused where a page is wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs import make_reference

pytest.importorskip("zensical", reason="zensical is not installed: pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings is not installed: pip install -e '.[docs]'")

ROOT = Path(__file__).resolve().parents[2]


def built(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from zensical.main import cli; cli()", "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    (folder / "src").symlink_to(ROOT / "src")
    (folder / "build").mkdir()
    make_reference.lay(folder / "build" / "docs")
    done = built(folder)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "No issues found" in said, said
    make_reference.sew(folder / "site")
    return folder


def test_nothing_on_a_page_comes_from_outside(folder):
    pages = list((folder / "site").rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\"> ]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|icon|preload)[^>]*href=\"?([^\"> ]+)", text)
        for source in loaded:
            assert not re.match(r"(https?:)?//", source), (page.name, source)
            if not source.startswith("data:"):
                start = folder / "site" if source.startswith("/") else page.parent  # 404.html counts from the root
                assert (start / source.split("?")[0].lstrip("/")).is_file(), (page.name, source)


def test_the_search_knows_the_pages_and_the_api(folder):
    index = (folder / "site" / "search.json").read_text(encoding="utf-8")
    assert "SubspaceProjection" in index and "pegp_lora_fresh" in index and "evaluate_every" in index
    assert (folder / "site" / "search.js").is_file()  # for pages that are opened from a folder


def test_the_api_is_there_with_signatures_and_docstrings(folder):
    page = (folder / "site" / "reference" / "rules.html").read_text(encoding="utf-8")
    for words in ("doc-function", "perpetune.rules.base.attach", "Hang rules on an optimizer", "Raises"):
        assert words in page


def test_a_link_that_leads_nowhere_stops_the_build(folder):
    page = folder / "build" / "docs" / "tutorial.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[lost](nowhere.md)\n", encoding="utf-8")
    assert built(folder).returncode != 0
