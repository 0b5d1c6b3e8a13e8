"""Is this directory a complete model? Everything that is missing is named at once, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ollm.errors import ModelDirectoryError
from ollm.models.references import did_you_mean
from ollm.weights.checkpoint import INDEX, SINGLE, read_index

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_model_directory(path: Path, *, where_from: str = "") -> None:
    """Check that `path` holds a config, complete safetensors weights and a tokenizer.

    Args:
        path: the directory.
        where_from: what to do about a missing one, appended to the message.

    Raises:
        ModelDirectoryError: lists everything that is missing, or says what is refused and why.
    """
    if not path.is_dir():
        meant = did_you_mean(path.name, _beside(path))
        raise ModelDirectoryError(f"There is no model directory {path}.{meant} {where_from}".strip())
    missing = []
    if not (path / CONFIG).is_file():
        missing.append(CONFIG)
    elif not isinstance(_read_json(path / CONFIG), dict):
        raise ModelDirectoryError(f"{path / CONFIG} is not a JSON object: the download is damaged, repeat it.")
    missing += _missing_weights(path)
    if not any((path / name).is_file() for name in TOKENIZERS):
        missing.append(f"a tokenizer ({' or '.join(TOKENIZERS)})")
    if missing:
        raise ModelDirectoryError(
            f"{path} is not a complete model, missing: {', '.join(missing)}. {where_from}".strip()
        )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checked model directory, sorted."""
    if (path / INDEX).is_file():
        return [path / name for name in sorted(set(read_index(path).values()))]
    return [path / SINGLE]


def _beside(path: Path) -> list[str]:
    """Names of the folders where it should be."""
    try:
        return [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        return []


def _missing_weights(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        return [name for name in sorted(set(read_index(path).values())) if not (path / name).is_file()]
    if (path / SINGLE).is_file():
        return []
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise ModelDirectoryError(
            f"{path} has its weights as {', '.join(pickled[:3])} only. Pickled weights can run code and are refused: "
            "get the model as safetensors, or convert it with transformers' save_pretrained()."
        )
    return [f"{SINGLE} (or {INDEX} and its shards)"]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"Cannot read {path}: {error}. The download is damaged, repeat it.") from None
