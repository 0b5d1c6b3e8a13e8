"""What a model id means: an alias, a local directory, or a Hub id. An alias is a convenience, not an admission gate."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import attrs

from ollm.errors import ConfigurationError

ALIASES = {
    "llama3-1B-chat": "unsloth/Llama-3.2-1B-Instruct",
    "llama3-3B-chat": "unsloth/Llama-3.2-3B-Instruct",
    "llama3-8B-chat": "unsloth/Meta-Llama-3.1-8B-Instruct",
    "gpt-oss-20B": "openai/gpt-oss-20b",
    "qwen3-next-80B": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "gemma3-12B": "google/gemma-3-12b-it",
    "voxtral-small-24B": "mistralai/Voxtral-Small-24B-2507",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@attrs.frozen
class ModelReference:
    """A model id and where its files are looked for: at `path`, or in `folder` below the models directory."""

    model_id: str
    hub_id: str | None
    """Hub repository, with `@revision` if one was named; `None` for a local directory."""
    path: Path | None = None
    folder: str = ""

    def directory(self, models_dir: str | os.PathLike[str]) -> Path:
        """The directory that should hold the model."""
        return self.path if self.path is not None else Path(models_dir) / self.folder


def resolve_reference(model_id: str) -> ModelReference:
    """What a model id means, without loading anything.

    Raises:
        ConfigurationError: when it is no alias, no local directory and no Hub id; lists the aliases.
    """
    if isinstance(model_id, str) and model_id in ALIASES:
        return ModelReference(model_id, ALIASES[model_id], folder=model_id)
    if isinstance(model_id, str) and model_id and "\0" not in model_id:
        path = Path(model_id).expanduser()
        if path.is_dir() or model_id.startswith((".", "/", "~")):
            return ModelReference(model_id, None, path=path)
        if _HUB_ID.fullmatch(model_id) and ".." not in model_id:
            return ModelReference(model_id, model_id, folder=model_id)
    raise ConfigurationError(
        f"model_id={model_id!r} is no alias ({', '.join(ALIASES)}), no directory, and no Hub id such as "
        f"'org/name' or 'org/name@revision'.{did_you_mean(model_id, ALIASES)}"
    )


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question to end a message with, if something that is known is called nearly so."""
    names = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), names, n=1) if isinstance(name, str) else []
    return f" Did you mean {names[close[0]]!r}?" if close else ""
