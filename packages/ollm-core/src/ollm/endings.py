"""How something ends that must end, whatever comes in between: by a call, when it is dropped, or with the process.

What an end does may be done again. So it is asked for until it has succeeded: after Ctrl-C, or an error of the disk.
"""

from __future__ import annotations

import weakref
from typing import Any


def end(finalizer: weakref.finalize[Any, Any]) -> None:
    """Do now what a finalizer would do. It stays until that has succeeded: the next call does it again, else whoever
    drops the object, else the end of the process."""
    pending = finalizer.peek()
    if pending is not None:
        _, action, arguments, settings = pending
        action(*arguments, **settings)
        finalizer.detach()
