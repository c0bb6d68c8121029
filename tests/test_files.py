import errno
import functools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from matchdistill.files import (
    PARTIAL,
    atomic_write,
    is_kind,
    path_of,
    read_bytes,
    read_json,
    remove_partial,
    write_json,
)


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    for text in ("old", "new"):
        atomic_write(path, partial(Path.write_text, data=text))
        assert path.read_text() == text
    assert names(path.parent) == ["note.txt"]


def test_temporary_is_a_sibling_with_the_same_suffix(tmp_path):
    seen = []

    def write(temporary):
        seen.append(temporary)
        temporary.write_bytes(b"x")

    path = tmp_path / "student.safetensors"
    atomic_write(path, write)
    assert seen[0].parent == path.parent
    assert seen[0].suffix == path.suffix
    assert seen[0] != path


def test_mode_is_that_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    atomic_write(tmp_path / "atomic", lambda temporary: temporary.write_text(""))
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failing_writer_leaves_the_old_file_and_no_debris(tmp_path, failure):
    path = tmp_path / "note.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise failure

    with pytest.raises(type(failure)):
        atomic_write(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["note.txt"]


@pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (Path, "replace")])
def test_failing_system_call_leaves_the_old_file(tmp_path, monkeypatch, owner, step):
    path = tmp_path / "note.txt"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, step, full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["note.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_the_file(tmp_path, number):
    def full(temporary):
        raise OSError(number, "no room")

    with pytest.raises(OSError, match=os.strerror(number)) as info:
        atomic_write(tmp_path / "note.txt", full)
    assert str(tmp_path / "note.txt") in str(info.value)
    assert info.value.errno == number


@pytest.fixture
def full_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_that_a_writer_does_not_name(full_disk):
    """PyTorch says of it "unexpected pos 64 vs 0"."""
    with pytest.raises(OSError, match="No space left on device") as info:
        atomic_write(full_disk / "x.pt", functools.partial(torch.save, torch.zeros(100_000)))
    assert info.value.filename == str(full_disk / "x.pt")
    assert names(full_disk) == []


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path):
    def broken(temporary):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        atomic_write(tmp_path / "x.pt", broken)
    assert names(tmp_path) == []


WRITE = """
import sys, time
from pathlib import Path
from matchdistill.files import atomic_write

def write(temporary):
    temporary.write_text("half")
    print(temporary, flush=True)
    time.sleep(60)

atomic_write(Path(sys.argv[1]), write)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process in the middle of a file, and the temporary file's path."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path / "a[b].json")], stdout=subprocess.PIPE, text=True
    )
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()


def test_what_a_killed_writer_leaves_is_removed_by_the_next_one(tmp_path, writer):
    process, temporary = writer
    (tmp_path / ".mine.txt").touch()
    assert temporary.exists()
    assert PARTIAL in temporary.name
    for remove in (lambda: remove_partial(tmp_path), lambda: atomic_write(tmp_path / "a[b].json", Path.touch)):
        remove()
        assert temporary.exists()  # its writer lives
    process.kill()
    process.wait()
    atomic_write(tmp_path / "other.json", Path.touch)
    assert temporary.exists()
    atomic_write(tmp_path / "a[b].json", Path.touch)
    assert sorted(names(tmp_path)) == [".mine.txt", "a[b].json", "other.json"]


def test_what_killed_writers_leave_anywhere_in_a_folder(tmp_path, writer):
    process, temporary = writer
    process.kill()
    process.wait()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    temporary.rename(tmp_path / "deep" / "er" / temporary.name)
    remove_partial(tmp_path)
    assert (tmp_path / "deep" / "er" / temporary.name).exists()
    remove_partial(tmp_path, f"**/.*{PARTIAL}*")
    assert names(tmp_path / "deep" / "er") == []


def test_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    for text, expected in (
        ("~", "/home/ann"),
        ("~/runs/x", "/home/ann/runs/x"),
        ("a/~/b", "a/~/b"),
        ("$HOME/x", "$HOME/x"),
        ("runs[1]", "runs[1]"),
        ("./~/x", str(Path.cwd() / "~/x")),  # not to be expanded by anyone after
        (Path("a") / "b", "a/b"),
    ):
        assert str(path_of(text)) == expected
        assert path_of(path_of(text)) == path_of(text)
    for empty in ("", " "):
        with pytest.raises(ValueError, match="a path is empty"):
            path_of(empty)
    with pytest.raises(ValueError, match="there is no home of ~nobody-has-this-name"):
        path_of("~nobody-has-this-name/x")


def test_json_round_trip_and_non_finite_values(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"accuracy": 0.5, "spread": float("nan"), "seeds": (1, float("inf")), "name": "ü"})
    assert json.loads(path.read_text()) == {"accuracy": 0.5, "spread": None, "seeds": [1, None], "name": "ü"}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"epoch": 1})
    with pytest.raises(TypeError):
        write_json(path, {"epoch": object()})
    assert json.loads(path.read_text()) == {"epoch": 1}
    assert names(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"seed": 1', "is damaged or not JSON"),
        (b"", "is damaged or not JSON"),
        (b"\xff\xfe", "is damaged or not JSON"),
        (b"[" * 100_000, "is damaged or not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"seed": "1"}', "seed, name is missing or has an unexpected type"),
    ],
)
def test_json_that_is_damaged_or_something_else(tmp_path, content, message):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        read_json(path, seed=int, name=str)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (True, bool, True),
        (1, float, True),
        ("1", float, False),
        (None, int | None, True),
        (None, int, False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ({"a": [1.5]}, dict[str, list[float]], True),
        ({"a": [None]}, dict[str, list[float]], False),
        ({"a": 1, "b": "x"}, {"a": int}, True),
        ({"b": 1}, {"a": int}, False),
        ([], {"a": int}, False),
    ],
)
def test_kinds_of_values(value, kind, fits):
    assert is_kind(value, kind) is fits


def test_a_key_that_is_there_twice_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match="the key 'b' twice"):
        read_json(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"is {said}, not a file"):
            read_bytes(path)
