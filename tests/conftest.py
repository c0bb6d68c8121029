import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from detectors import SMALL, write_coco
from matchdistill.models import build_detector, small_resnet
from matchdistill.runs.recipe import Recipe, load_recipe
from pixelsets import SMALL as SMALL_PIXELS
from pixelsets import write_pixels
from records import TINY


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option of our own."""
    parser.addoption("--until", type=float, help="time (date +%%s) from which on no more tests begin: they are skipped")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin too late."""
    until = item.config.getoption("--until")
    if until is not None and time.time() > until:
        pytest.skip("no time was left for it (--until)")


@pytest.fixture(autouse=True)
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs make no pages, which take as long as training a tiny network, but in tests marked so."""
    if "pages" not in request.keywords:
        for module in ("train", "compare"):
            monkeypatch.setattr(f"matchdistill.runs.{module}.write_report", lambda folders: None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in the same order in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny recipe's teacher."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(0)
    torch.save(small_resnet(width=4).state_dict(), path)
    return path


@pytest.fixture
def tiny_file(tmp_path: Path, teacher_weights: Path) -> Path:
    """A recipe of seconds in a file: digits, two epochs, a teacher with weights from a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "teacher": {**TINY["teacher"], "weights": str(teacher_weights)}}))
    return path


@pytest.fixture
def tiny(tiny_file: Path, one_thread: None) -> Callable[..., Recipe]:
    """The recipe of `tiny_file` with arguments of the command line over it."""
    return functools.partial(load_recipe, tiny_file)


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set as COCO 2017 unpacks."""
    return write_coco(tmp_path_factory.mktemp("coco") / "coco")


@pytest.fixture(scope="session")
def detector_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the small recipe's teacher."""
    path = tmp_path_factory.mktemp("detector") / "teacher.pt"
    torch.manual_seed(0)
    torch.save(build_detector(SMALL["teacher"]["name"], 3, **SMALL["teacher"]["options"]).state_dict(), path)
    return path


@pytest.fixture
def small_file(tmp_path: Path, coco: Path, detector_weights: Path) -> Path:
    """A recipe of seconds for a detector in a file."""
    path = tmp_path / "small.yaml"
    teacher = {**SMALL["teacher"], "weights": str(detector_weights)}
    path.write_text(yaml.safe_dump({**SMALL, "data": {**SMALL["data"], "root": str(coco)}, "teacher": teacher}))
    return path


@pytest.fixture
def small(small_file: Path, one_thread: None) -> Callable[..., Recipe]:
    """The recipe of `small_file` with arguments of the command line over it."""
    return functools.partial(load_recipe, small_file)


@pytest.fixture(scope="session")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of images and masks."""
    return write_pixels(tmp_path_factory.mktemp("pixels") / "pixels")


@pytest.fixture
def pixelset_file(tmp_path: Path, pixels: Path) -> Path:
    """A recipe of seconds for images with a class for every pixel in a file."""
    path = tmp_path / "pixels.yaml"
    path.write_text(yaml.safe_dump({**SMALL_PIXELS, "data": {**SMALL_PIXELS["data"], "root": str(pixels)}}))
    return path


@pytest.fixture
def pixelset(pixelset_file: Path, one_thread: None) -> Callable[..., Recipe]:
    """The recipe of `pixelset_file` with arguments of the command line over it."""
    return functools.partial(load_recipe, pixelset_file)
