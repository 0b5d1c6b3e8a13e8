"""Children of a test: what goes wrong in them is told here, and none outlives its test."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def in_child(action: Callable[[], None], *, killed: bool = False, seconds: int = 60) -> None:
    """Run `action` in a forked child; what fails there fails here, with the child's traceback.

    Args:
        action: what to do there.
        killed: whether it ends with kill -9.
        seconds: after which the system ends it, whatever it waits for.
    """
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        code = 0
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            action()
        except BaseException:
            code = 1
            os.write(writer, traceback.format_exc().encode()[-60000:])
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        report = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        report = f"it hangs: nothing came of it in {seconds} s"
    assert code == (-signal.SIGKILL if killed else 0), f"in the child:\n{report}"


def _fork() -> int:
    with warnings.catch_warnings():  # newer Pythons warn of forks beside threads; a child only does what is asked
        warnings.simplefilter("ignore")
        return os.fork()


@contextmanager
def watchdog(seconds: int = 60) -> Iterator[None]:
    """Whatever hangs in the `with` block is interrupted, in the main thread."""

    def bark(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"this hangs: nothing came of it in {seconds} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
