import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from matchdistill.data.archives import extract_once


def test_one_of_several_extracts_and_all_wait_for_it(tmp_path):
    folder, calls, start = tmp_path / "data", [], threading.Barrier(4)

    def extract(partial):
        calls.append(partial)
        time.sleep(0.2)
        (partial / "made").mkdir()
        (partial / "made" / "file").write_text("all of it")
        return partial / "made"

    def run():
        start.wait()
        extract_once(tmp_path / "archive", folder, extract)
        return (folder / "file").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert [each.result() for each in [pool.submit(run) for _ in range(4)]] == ["all of it"] * 4
    assert len(calls) == 1


def test_the_next_one_extracts_after_a_failure(tmp_path):
    def fail(partial):
        (partial / "file").write_text("a part")
        raise OSError(28, "No space left on device")

    def extract(partial):
        assert not list(partial.iterdir())
        return partial

    for _ in range(2):
        with pytest.raises(ValueError, match=r"archive cannot be extracted into .*data \(OSError: .*No space left"):
            extract_once(tmp_path / "archive", tmp_path / "data", fail)
    extract_once(tmp_path / "archive", tmp_path / "data", extract)
    assert (tmp_path / "data").is_dir()
