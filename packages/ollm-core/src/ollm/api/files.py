"""Reading a document for a prompt."""

import os
from pathlib import Path

from ollm.errors import ConfigurationError


def file_get_contents(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file (a byte-order mark is dropped).

    Raises:
        ConfigurationError: when there is no such file, or it is not UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text ({error}): convert it first.") from None
    except OSError as error:
        raise ConfigurationError(f"Cannot read {path}: {error.strerror}.") from None
