"""Every error that ollm raises on purpose, in one place, under one base class.

A message says what failed, on what, and what to do next. Errors that callers of transformers already
expect (`ValueError` for a bad argument, `NotImplementedError` for an operation that cannot be done) keep
that second base, so that generic handlers go on working.
"""

_MOST_CHARACTERS = 2000
_LAST_CHARACTERS = 400
"""Kept of a message that is cut: what to do next stands at its end."""
_MOST_SAID = 160


def brief(error: BaseException) -> str:
    """What somebody else's error says, as a part of a message: its first line, cut where it goes on and on."""
    said = next(iter(str(error).splitlines()), "")
    said = said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID].rstrip()} …"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class OllmError(Exception):
    """Base class of all errors that ollm raises on purpose. A message of more than 2,000 characters is cut in its
    middle: it may repeat what somebody's file says."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_cut(argument) if isinstance(argument, str) else argument for argument in args))


def _cut(message: str) -> str:
    if len(message) <= _MOST_CHARACTERS:
        return message
    return f"{message[: _MOST_CHARACTERS - _LAST_CHARACTERS - 3]} … {message[-_LAST_CHARACTERS:]}"


class ConfigurationError(OllmError, ValueError):
    """An argument, option or setting is wrong; the message names it and the choices."""


class UnknownStrategyError(ConfigurationError):
    """No plugin offers a strategy or a command of that name; the message lists what there is and what is not loaded."""


class AmbiguousStrategyError(ConfigurationError):
    """Several distributions offer this name, so it belongs to nobody; use the qualified name."""


class PluginError(OllmError):
    """A plugin broke the contract; the message names plugin, hook and what is wrong."""


class StoreContractError(PluginError):
    """A KV store answered something that its contract rules out (lengths, order, shapes, dtypes)."""


class ModelDirectoryError(OllmError):
    """A local model directory is missing, incomplete or of a kind that is refused; the message says which."""


class DeviceError(ConfigurationError):
    """The requested device does not exist here or is not supported."""


class NotLoadedError(OllmError, RuntimeError):
    """An operation needs a loaded model; call `ini_model` first."""


class MissingExtraError(OllmError, ImportError):
    """A feature needs a distribution that is not installed; the message holds the install command."""


class CacheError(OllmError):
    """Base class of errors of a KV cache at work."""


class MemoryLimitError(CacheError, MemoryError):
    """So much memory is not free; the message says what it was for, how much it takes and how much there is."""


class CacheDirectoryError(CacheError):
    """The cache directory cannot be used: not writable, not ours, or not safe (links, foreign owners, modes)."""


class CacheBusyError(CacheError):
    """Another process, or another thread, is at work with what was asked for."""


class CacheClosedError(CacheError, RuntimeError):
    """The cache was closed; make a new one."""


class CacheForkedError(CacheError, RuntimeError):
    """A cache was used in a process that was forked after the cache was made."""


class BatchMismatchError(CacheError, ValueError):
    """A cache that holds one batch was given keys and values of another; call `reset()` or make another cache."""


class BlockModeError(CacheError, RuntimeError):
    """Block-mode keys and values met code that takes tensors; the message names the operation."""


class ContinuationError(CacheError, ValueError):
    """What was passed does not continue what the cache holds, or nothing of it is new; the message names the first
    position that differs, and what to do."""


class CacheNotFilledError(CacheError, RuntimeError):
    """A forward pass did not put into the cache what it was given: the model used another cache than the one that it
    was called with, or filled it in part, or twice. The pass was undone."""


class InterruptedForwardError(CacheError, RuntimeError):
    """An earlier forward pass stopped half-way and could not be undone, so the layers do not belong together; call
    `reset()`."""


class UnsupportedOperationError(CacheError, NotImplementedError):
    """This model's layers cannot do the operation (cropping a recurrent state, or past a sliding window)."""


class StorageError(CacheError):
    """Reading or writing stored keys and values failed."""


class DiskFullError(StorageError):
    """No room for more keys and values; the message names the bytes needed and the bytes free."""


class CorruptDataError(StorageError):
    """Stored bytes are not what was asked for: damaged, misplaced, truncated or of a foreign format."""


class NonFiniteError(StorageError, ValueError):
    """Keys or values hold NaN or Inf where a format cannot keep them."""


class WeightsError(OllmError, RuntimeError):
    """Weights that are read while the model runs could not be read, or their files were changed; or they are not in
    memory where somebody wants to use them, or were changed there and would be lost. The message names the file or the
    tensor."""
