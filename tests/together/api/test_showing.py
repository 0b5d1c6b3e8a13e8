"""What people see without asking for it: log lines, and how far a prompt is."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from ollm.api import showing
from ollm.kv.state import PrefillProgress

FAR = {"tokens": 33_000, "layers": 4, "saved_bytes": 3 * 2**20, "seconds": 2.0, "eta_seconds": 6.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """`shown()`: from then on stderr is a terminal, and this what it gets. pytest has its own between its phases."""

    def begin(stream=None):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "stderr", stream or Terminal())
        return sys.stderr

    return begin


def progress(layers_done, **more):
    return PrefillProgress(layers_done=layers_done, **{**FAR, **more})


def test_a_terminal_shows_how_far_a_prompt_is_and_nothing_is_left_of_it(shown):
    stderr = shown()
    show = showing.PrefillLine()
    show(progress(1.0))
    assert "reading 33,000 tokens" in stderr.getvalue()
    assert "3.0 MiB stored, 6 s left" in stderr.getvalue()
    show(progress(4.0, eta_seconds=0.0))
    assert show._line is None
    assert re.search(r"\x1b\[1A\x1b\[2K|\x1b\[2K", stderr.getvalue()), "the line is gone"


def test_what_is_quick_and_what_is_no_terminal_shows_nothing(shown):
    stderr = shown()
    showing.PrefillLine()(progress(1.0, seconds=0.1, eta_seconds=0.5))
    assert stderr.getvalue() == ""
    stderr = shown(io.StringIO())
    showing.PrefillLine()(progress(1.0))
    assert stderr.getvalue() == ""


def test_a_prompt_that_failed_leaves_the_line_to_the_next(shown):
    stderr = shown()
    show = showing.PrefillLine()
    show(progress(3.0))
    first = show._line
    show(progress(0.5, tokens=77_000))
    assert first.finished is False and show._line is not first
    assert "reading 77,000 tokens" in stderr.getvalue()
    show(progress(4.0))


@pytest.fixture
def bare():
    """The logger `ollm` in a process that has set no logging up."""
    root, ours = logging.getLogger(), logging.getLogger("ollm")
    before = [*root.handlers], [*ours.handlers], ours.level
    ours.handlers = []
    ours.setLevel(logging.NOTSET)
    yield ours
    root.handlers, ours.handlers = before[:2]
    ours.setLevel(before[2])


def test_log_lines_are_shown_where_no_logging_is_set_up(bare, shown):
    stderr = shown()
    logging.getLogger().handlers = []
    showing.show_log()
    showing.show_log()
    logging.getLogger("ollm.api").info("loaded")
    assert stderr.getvalue() == "ollm.api: loaded\n"


def test_a_program_that_sets_logging_up_is_left_alone(bare, shown):
    stderr = shown()
    logging.getLogger().handlers = [logging.NullHandler()]
    showing.show_log()
    logging.getLogger("ollm").info("loaded")
    assert (bare.handlers, bare.level, stderr.getvalue()) == ([], logging.NOTSET, "")


SCRIPT = """
import torch
from ollm import disk_cache
from ollm.api import showing
from together.tiny_models import make_model

showing._SECONDS = 0.0
model = make_model("llama")
with disk_cache(model, cache_dir=".", dense_projection_chunk_rows=64) as cache, torch.inference_mode():
    model(torch.arange(3, 190)[None], past_key_values=cache)
"""


def test_it_appears_by_itself_in_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    path = os.pathsep.join(sys.path)
    done = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, stderr=theirs,
        env={**os.environ, "PYTHONPATH": path, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        shown += more
    assert done.wait() == 0, shown.decode()
    assert "reading 187 tokens" in shown.decode()
