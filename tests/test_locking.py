import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings

import pytest

from matchdistill import locking
from matchdistill.locking import LOCK, held, is_locked

HOLD = """
import os, sys, time
from pathlib import Path
from matchdistill.locking import held
with held(Path(sys.argv[1])):
    if "fork" in sys.argv:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds a folder."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), *arguments], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        said = []
        while "held" not in said:
            said.append(process.stdout.readline().strip())
        return process, said

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_another_process_is_told_who_holds_a_folder(tmp_path, holder):
    process, _ = holder()
    with pytest.raises(ValueError, match="run is in use by process") as info, held(tmp_path / "run"):
        pass
    assert f"by process {process.pid} on {socket.gethostname()} since 20" in str(info.value)
    assert "choose another --out" in str(info.value)


def test_a_lock_ends_with_its_process(tmp_path, holder):
    process, _ = holder()
    process.kill()
    process.wait()
    assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == process.pid
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_workers_of_a_killed_process_do_not_hold_its_folder(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locking, "LONGEST", 0.0)
    process, (child, _) = holder("fork")
    process.kill()
    process.wait()
    os.kill(int(child), 0)  # it lives
    try:
        with held(tmp_path / "run"):
            pass
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_the_same_process_does_not_hold_a_folder_twice(tmp_path):
    with held(tmp_path), held(tmp_path / "inside"):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), held(tmp_path):
            pass
        assert is_locked(tmp_path / LOCK) is True


def test_it_waits_for_processes_whose_parent_is_gone(tmp_path, holder):
    process, _ = holder()
    gone = subprocess.Popen(["true"])
    gone.wait()
    path = tmp_path / "run" / LOCK
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parent": gone.pid}))
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
    begun = time.monotonic()
    with held(tmp_path / "run"):
        assert time.monotonic() - begun < 15


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    with held(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "note").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "mine", "note"]


def test_of_many_that_begin_at_once_one_gets_it(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom matchdistill import locking\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "with locking.held(Path(sys.argv[1])): sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "new" / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("begin\n")
        process.stdin.flush()
    begun = time.monotonic()
    while sum(process.poll() is None for process in started) > 1 and time.monotonic() - begun < 60:
        time.sleep(0.05)
    errors = [
        process.communicate(timeout=60)[1] for process in started
    ]  # which closes the input of the one that holds it
    assert sorted(process.returncode for process in started) == [0, 1, 1, 1]
    assert sum("ValueError" in error and "is in use by" in error for error in errors) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "try_lock", lambda descriptor: None)
    with pytest.warns(UserWarning, match="cannot be locked on its file system"), held(tmp_path / "run"):
        found = is_locked(tmp_path / "run" / LOCK)
    assert found is None


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"process": "x"}'])
def test_what_a_lock_says_can_be_anything(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with held(tmp_path):
            (tmp_path / LOCK).write_bytes(content)
            with pytest.raises(ValueError, match=r"is in use by (another )?process"), held(tmp_path):
                pass
