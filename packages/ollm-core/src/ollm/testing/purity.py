"""Whether code has side effects that Python can see: files, processes, connections."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_FORBIDDEN = ("open", "socket.", "subprocess.", "os.", "shutil.", "tempfile.")
_watching = threading.local()
_installed = False


@contextmanager
def no_side_effects() -> Iterator[None]:
    """Fails if this thread opens, starts or changes anything outside itself in the `with` block."""
    global _installed
    if not _installed:
        sys.addaudithook(_note)  # there is no way to remove one
        _installed = True
    _watching.seen = []
    try:
        yield
    finally:
        seen, _watching.seen = _watching.seen, None
    assert not seen, f"a pure function did: {', '.join(sorted(set(seen)))}"


def _note(event: str, arguments: tuple[object, ...]) -> None:
    seen = getattr(_watching, "seen", None)
    if seen is not None and event.startswith(_FORBIDDEN):
        seen.append(f"{event}{arguments[:1]}")
