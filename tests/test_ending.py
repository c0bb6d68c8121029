import signal
import subprocess
import sys
import threading
import time

import pytest

from matchdistill.ending import Terminated, of_others, orderly, take_signals, whole

CODES = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.fixture(autouse=True)
def as_it_was():
    before = {number: signal.getsignal(number) for number in CODES}
    yield
    assert {number: signal.getsignal(number) for number in CODES} == before


def wait():
    until = time.monotonic() + 5
    while time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_the_work(number):
    def work():
        with orderly(), orderly():  # as a run within a command
            signal.raise_signal(number)
            wait()

    with pytest.raises(CODES[number]) as info:
        work()
    assert getattr(info.value, "code", None) == (143 if number == signal.SIGTERM else None)


@pytest.mark.parametrize("number", CODES)
def test_whatever_else_has_taken_the_signals(number):
    def work():
        with orderly():
            signal.signal(number, lambda *_: None)
            take_signals()
            signal.raise_signal(number)
            wait()

    with pytest.raises(CODES[number]):
        work()


@pytest.mark.parametrize("number", CODES)
def test_signals_that_a_scheduler_has_taken_stay_its_own(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    try:
        with of_others(), orderly():
            signal.signal(number, lambda *_: seen.append("Lightning's"))
            take_signals()
            signal.raise_signal(number)
        signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert seen == [number, number]


@pytest.mark.parametrize("number", CODES)
def test_whatever_comes_of_the_ending(number):
    def work():
        with orderly():
            try:
                signal.raise_signal(number)
            except BaseException as error:
                raise SystemExit(1) from error  # as Lightning does

    with pytest.raises(CODES[number]):
        work()


@pytest.mark.parametrize("number", CODES)
def test_what_is_whole_is_not_cut(number):
    done = []

    def work():
        with orderly():
            with whole(), whole():
                signal.raise_signal(number)
                done.append("first")
            done.append("second")

    with pytest.raises(CODES[number]):
        work()
    assert done == ["first"]


def test_a_signal_that_comes_twice():
    done = []

    def work():
        with orderly():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)  # to the process, and to its group
                done.append("tidied up")

    with pytest.raises(Terminated):
        work()
    assert done == ["tidied up"]


def test_errors_of_the_work_stay_what_they_are():
    with pytest.raises(OSError, match="full"), orderly():
        raise OSError("full")
    with orderly():
        pass
    take_signals()


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in the background
    try:
        with orderly():
            signal.raise_signal(signal.SIGINT)
            take_signals()
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_do_as_they_did():
    found = []

    def work():
        with orderly():
            take_signals()
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def child(script, number, after="ready"):
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == after
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def test_an_ending_that_hangs_is_cut():
    script = (
        "import time\nfrom matchdistill import ending\nending.GRACE = 0.5\nwith ending.orderly():\n    try:\n"
        "        print('ready', flush=True); time.sleep(60)\n    finally:\n        time.sleep(60)\n"
    )
    assert child(script, signal.SIGTERM) == (143, "")


def test_a_fork_is_none_of_the_work():
    script = (
        "import os, signal, sys, time\nfrom matchdistill.ending import orderly\n"
        "with orderly():\n    pid = os.fork()\n    if pid == 0:\n        time.sleep(60)\n"
        "    time.sleep(0.2); os.kill(pid, signal.SIGTERM)\n    status = os.waitpid(pid, 0)[1]\n"
        "    assert os.WTERMSIG(status) == signal.SIGTERM, status\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    code, error = child(script, signal.SIGTERM)
    assert code == 143
    assert "Terminated" not in error
