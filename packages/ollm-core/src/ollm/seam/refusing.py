"""The one place where whatever transformers, tokenizers or peft say of somebody's files becomes an error of ollm's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ollm.errors import ModelDirectoryError, OllmError

_MOST_CHAINED = 2000


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Files of others are read meanwhile, by code of others: whatever it raises says that they cannot be used.

    Args:
        what: the beginning of the message.

    Raises:
        ModelDirectoryError: for any error that is not ours. Interrupts pass.
    """
    try:
        yield
    except OllmError:
        raise
    except BaseException as error:
        # tokenizers is written in Rust, and where it gives up raises what is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())
        refusal = ModelDirectoryError(f"{what}: {type(error).__name__}: {said}")
        raise refusal from (error if len(said) <= _MOST_CHAINED else None)
