"""The site builds without a warning, and is whole: it fetches nothing, and its figures have words."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from matchdistill.cli import COMMANDS

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium")
FETCHING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
    "use": "href",
}
IN_STYLES = re.compile(r"""(?:@import\s*|url\(\s*)["']?((?:https?:)?//[^"')\s]+)""")


class Reader(HTMLParser):
    """What a page fetches as it is shown, and its images' texts."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.texts: dict[str, str] = {}  # of images, by their address

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element's address."""
        values = {name: value or "" for name, value in attrs}
        if tag in FETCHING:
            self.fetched.append(values.get(FETCHING[tag], ""))
            self.fetched += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(values.get("href", ""))
        if tag == "img":
            self.texts[values.get("src", "")] = values.get("alt", "")
        self.fetched += IN_STYLES.findall(values.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CI builds it."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def pages(site: Path) -> Iterator[tuple[str, str]]:
    """Every page's path and text."""
    for path in sorted(site.rglob("*.html")):
        yield str(path.relative_to(site)), path.read_text()


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for name, text in pages(site):
        reader = Reader()
        reader.feed(text)
        styles = IN_STYLES.findall("".join(re.findall(r"<style.*?</style>", text, re.DOTALL)))
        outside = [address for address in [*reader.fetched, *styles] if re.match(r"(https?:)?//", address)]
        assert not outside, f"{name} fetches {outside}"
    for path in site.rglob("*.css"):
        assert not IN_STYLES.findall(path.read_text()), path


@pytest.mark.slow
def test_figures_have_texts_and_both_colours(site: Path) -> None:
    texts: dict[str, str] = {}
    for _, text in pages(site):
        reader = Reader()
        reader.feed(text)
        texts |= reader.texts
    assert all(texts.values()), texts
    figures = {Path(address.partition("#")[0]).name for address in texts if "figures/" in address}
    assert figures == {path.name for path in (site / "figures").iterdir()}
    assert {name.rpartition("-")[2] for name in figures} == {"light.svg", "dark.svg"}


@pytest.mark.slow
def test_examples_of_docstrings_are_code(site: Path) -> None:
    for name, text in pages(site):
        prose = re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)
        assert "&gt;&gt;&gt;" not in prose, f"{name}: write 'Examples:' over the examples of a docstring"


@pytest.mark.slow
def test_the_commands_show_their_help(site: Path) -> None:
    text = (site / "reference/command-line/index.html").read_text()
    assert all(f'<h2 id="{command}">' in text for command in COMMANDS)
    assert "--resume" in text
    assert "trainer.prepare_teacher" in (site / "reference/options/index.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_code_is_not_cut_on_a_small_screen(site: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    too_wide = "blocks => blocks.filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.textContent)"
    columns = """() => {
        const code = document.querySelector(".md-typeset pre > code");
        const probe = document.createElement("span");
        probe.textContent = "m".repeat(100);
        code.append(probe);
        return 100 * (code.clientWidth - 40) / probe.getBoundingClientRect().width;
    }"""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        for name in ("index", "howto/models/index", "howto/cluster/index", "howto/processes/index"):
            page.goto((site / f"{name}.html").as_uri())
            assert page.locator("pre > code").evaluate_all(too_wide) == [], name
        page.goto((site / "howto/loops/index.html").as_uri())
        assert page.evaluate(columns) >= 110
        browser.close()


@pytest.mark.slow
def test_it_has_the_page_of_a_run(site: Path) -> None:
    assert 'href="../../example-report.html"' in (site / "howto/report/index.html").read_text()
    text = (site / "example-report.html").read_text()
    assert text.count('class="plot"') > 10
    assert "Not finished" not in text
