"""Is this directory a complete model, and small enough to be read? Everything that is missing is named at once, before
any weight is read; size, depth and counts are bounded before anybody parses a file."""

from __future__ import annotations

import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import attrs

from ollm.errors import ModelDirectoryError
from ollm.io import strict_json
from ollm.models.references import did_you_mean
from ollm.weights.checkpoint import INDEX, SINGLE, WeightNames, find_weights

CONFIG = "config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MIB = 2**20
_MOST_BYTES = {
    "config*.json": 4 * _MIB,
    "generation_config.json": 4 * _MIB,
    "adapter_config.json": 4 * _MIB,
    "chat_template*": 4 * _MIB,
    "additional_chat_templates/*.jinja": 4 * _MIB,
    "tokenizer_config.json": 32 * _MIB,
    "special_tokens_map.json": 32 * _MIB,
    "added_tokens.json": 32 * _MIB,
    "tokenizer*": 128 * _MIB,
    "vocab*": 128 * _MIB,
    "merges.txt": 128 * _MIB,
    "tekken.json": 128 * _MIB,
    "*.model": 128 * _MIB,
}
"""What transformers may read beside the weights, by pattern, and how large it may be: several times the largest known
of its kind. The first pattern that fits counts."""
_MOST_DEPTH = 64


@attrs.frozen
class ModelDirectory:
    """A directory that was checked."""

    path: Path
    config: dict[str, Any]
    """What `config.json` says, before anybody makes something of it."""

    @property
    def chosen_weights(self) -> str | None:
        """The file that the config names as its weights, if it does."""
        return _chosen(self.path, self.config)


def check_model_directory(path: Path, *, where_from: str = "") -> ModelDirectory:
    """Check that `path` holds a config, complete safetensors weights and a tokenizer, all of sensible size.

    Args:
        path: the directory.
        where_from: what to do about a missing one, appended to the message.

    Raises:
        ModelDirectoryError: lists everything that is missing, or says what is refused and why.
    """
    try:
        return _check(path, where_from)
    except (OSError, ValueError) as error:  # a name that no path may have, a folder that cannot be listed
        raise ModelDirectoryError(f"Cannot look into the model directory {path}: {error}.") from error


def _check(path: Path, where_from: str) -> ModelDirectory:
    if not path.is_dir():
        meant = did_you_mean(path.name, _beside(path))
        raise ModelDirectoryError(f"There is no model directory {path}.{meant} {where_from}".strip())
    check_sizes(path)
    missing, config = [], {}
    if (path / CONFIG).is_file():
        config = read_object(path / CONFIG)
    else:
        missing.append(CONFIG)
    missing += _missing_weights(path, _chosen(path, config))
    if not has_tokenizer(path):
        missing.append(f"a tokenizer ({' or '.join(TOKENIZERS)})")
    if missing:
        raise ModelDirectoryError(
            f"{path} is not a complete model, missing: {', '.join(missing)}. {where_from}".strip()
        )
    return ModelDirectory(path, config)


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((path / name).is_file() for name in TOKENIZERS)


def check_sizes(path: Path) -> None:
    """Check that what transformers may read in a directory, beside the weights, is small enough to be read.

    Raises:
        ModelDirectoryError: names the file and what is too large.
    """
    for folder in (path, path / "additional_chat_templates"):
        for entry in os.scandir(folder) if folder.is_dir() else ():
            name = str(Path(entry.path).relative_to(path))
            most = next((most for pattern, most in _MOST_BYTES.items() if fnmatch(name, pattern)), None)
            if most is not None and entry.is_file():
                _check_size(Path(entry.path), most)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that `check_sizes` has found small.

    Raises:
        ModelDirectoryError: it cannot be read, is nested too deep, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not strict_json.is_shallow(content, _MOST_DEPTH):
            raise ValueError(f"nested deeper than {_MOST_DEPTH}")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelDirectoryError(f"Cannot read {path}: {error}. The download is damaged, repeat it.") from None
    if not isinstance(content, dict):
        raise ModelDirectoryError(f"{path} is not a JSON object: the download is damaged, repeat it.")
    return content


def _check_size(path: Path, most_bytes: int) -> None:
    size = path.stat().st_size
    if size > most_bytes:
        raise ModelDirectoryError(
            f"{path} is {size} bytes long; more than {most_bytes} are not read, and no known model has them."
        )
    if path.suffix == ".json":
        try:
            strict_json.check_bounds(path.read_bytes(), most_bytes=most_bytes, most_values=strict_json.MOST_VALUES)
        except ValueError as error:
            raise ModelDirectoryError(f"{path} is not read: {error}.") from None


def _chosen(path: Path, config: dict[str, Any]) -> str | None:
    chosen = config.get("transformers_weights")
    if chosen is not None and not isinstance(chosen, str):
        raise ModelDirectoryError(f"transformers_weights in {path / CONFIG} is no name of a file.")
    return chosen


def _beside(path: Path) -> list[str]:
    """Names of the folders where it should be."""
    try:
        return [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        return []


def _missing_weights(path: Path, chosen: str | None) -> list[str]:
    names = find_weights(path, chosen)
    if names is not None:
        return _absent(path, names)
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise ModelDirectoryError(
            f"{path} has its weights as {', '.join(pickled[:3])} only. Pickled weights can run code and are refused: "
            "get the model as safetensors, or convert it with transformers' save_pretrained()."
        )
    return [f"{SINGLE} (or {INDEX} and its shards)"]


def _absent(path: Path, names: WeightNames) -> list[str]:
    absent = [name for name in names.files if not (path / name).is_file()]
    return [*absent[:20], f"{len(absent) - 20} more"] if len(absent) > 20 else absent
