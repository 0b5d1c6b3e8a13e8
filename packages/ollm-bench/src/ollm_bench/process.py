"""The process of one case: its request as JSON on stdin, its result as JSON on stdout, what it does now on stderr.

Nothing is imported before the request has come, so that whoever started this process can first put it where its memory
is limited. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

PROGRESS = "@progress "
"""What lines on stderr begin with that say what the process does now."""


def say(what: str) -> None:
    """Tell whoever started this process what it does now."""
    print(f"{PROGRESS}{what}", file=sys.stderr, flush=True)


def timed(action: Callable[[], object]) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def answer(request_type: Callable[[], Any], measure: Callable[[Any], Any]) -> None:
    """Read the request, measure what it asks for, and write the result.

    Args:
        request_type: imports the class of the request.
        measure: takes a request and returns a record.
    """
    text = sys.stdin.read()
    import cattrs

    print(json.dumps(cattrs.unstructure(measure(cattrs.structure(json.loads(text), request_type())))))
