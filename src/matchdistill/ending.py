"""How work ends when it is told to: by Ctrl-C or SIGTERM at once, but not in the middle of a file; or by its time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
OUT_OF_TIME = 75  # the exit code; EX_TEMPFAIL of sysexits.h: try again later
GRACE = 30.0  # seconds that the ending may take, without the file that is being written
TWICE = 2.0  # seconds within which the same signal comes to a process and its group


class Terminated(SystemExit):
    """The work was ended by SIGTERM."""


class OutOfTime(SystemExit):
    """The work has reached its time limit, and can go on.

    Args:
        how: what tells so.
    """

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.code = OUT_OF_TIME


class _Ended(BaseException):
    """Within the work; no KeyboardInterrupt, of which Lightning makes an exit with code 1."""


class _Ending:
    """What is to be done about signals in this process.

    Attributes:
        process: whose work it is; None: there is none.
        handlers: what handles the signals in it, by number.
        told: the signal that has come.
        since: when it came.
        whole: how many blocks are not to be cut.
    """

    process: int | None = None
    handlers: dict[signal.Signals, Callable[..., Any] | int | None] = {}  # noqa: RUF012 - replaced, never changed
    told: int | None = None
    since = 0.0
    whole = 0


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the work inside by KeyboardInterrupt and `Terminated`, whatever else handles them in it.

    Within another one, or outside of the main thread, it does nothing. Signals that are ignored stay so.
    """
    if _Ending.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in CODES}
    _Ending.process, _Ending.told, _Ending.whole = os.getpid(), None, 0
    _Ending.handlers = {number: _handle for number, handler in before.items() if handler != signal.SIG_IGN}
    try:
        take_signals()
        yield
    except BaseException as error:
        if _Ending.told is None:
            raise
        raise exception(_Ending.told) from error
    finally:
        _Ending.process = _Ending.told = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def of_others() -> Iterator[None]:
    """Ctrl-C and SIGTERM stay what they are inside, as a scheduler has set them, whatever takes them in it."""
    _Ending.process, _Ending.told = os.getpid(), None
    _Ending.handlers = {number: signal.getsignal(number) for number in CODES}
    try:
        yield
    finally:
        take_signals()
        _Ending.process = None


def exception(number: int) -> BaseException:
    """What tells that a signal has ended the work."""
    return Terminated(CODES[signal.SIGTERM]) if number == signal.SIGTERM else KeyboardInterrupt()


def take_signals() -> None:
    """Take the signals of the work back from what has taken them in it."""
    if _Ending.process == os.getpid() and threading.current_thread() is threading.main_thread():
        for number, handler in _Ending.handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """What is done inside is not cut: signals wait."""
    _Ending.whole += 1
    try:
        yield
    finally:
        _Ending.whole -= 1
        told = _Ending.told is not None and _Ending.process == os.getpid()
    if told and not _Ending.whole:
        raise _Ended


def _handle(number: int, frame: FrameType | None) -> None:
    if _Ending.process != os.getpid():  # a fork, as a loader's workers are: not its work
        if number == signal.SIGINT:
            raise KeyboardInterrupt  # which they expect
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _Ending.told is None:
        _Ending.told, _Ending.since = number, time.monotonic()
        threading.Thread(target=_cut, args=(CODES[signal.Signals(number)],), daemon=True).start()
    elif time.monotonic() - _Ending.since < TWICE:
        return
    if not _Ending.whole:
        raise _Ended


def _cut(code: int) -> None:
    """End the process if it does not end by itself, as where other processes are waited for that are gone."""
    own: Any = _Ending.process
    time.sleep(GRACE)
    while _Ending.whole:
        time.sleep(0.1)
    if _Ending.process == own and _Ending.told is not None:
        os._exit(code)
