"""A release can be built: sdist and wheel are sound, and the wheel runs without the repository."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    assert citation["cff-version"] == "1.2.0"
    paper = citation["preferred-citation"]
    assert paper["title"] == "Matching Guided Distillation"
    assert [author["family-names"] for author in paper["authors"]] == ["Yue", "Deng", "Zhou"]


def test_the_changelog_begins_with_this_version():
    assert re.findall(r"^### (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == VERSION


@pytest.mark.slow
def test_sdist_and_wheel(tmp_path):
    environment = {**os.environ, "DEPENDENCIES_OF": sys.executable}
    command = ["bash", str(ROOT / ".ci/release-check"), str(tmp_path / "dist")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"matchdistill {VERSION}: sdist and wheel are sound" in done.stdout
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "matchdistill"
    for path in [*package.rglob("*.py"), *package.rglob("*.yaml"), *package.rglob("*.html"), package / "py.typed"]:
        assert str(path.relative_to(ROOT / "src")) in inside
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/README.md") for name in archive.getnames())
