"""Folders with a model, before anything is loaded: the config, the files, and whether a cache can be filled for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ollm.plugin import ConfigurationError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_config(folder: Path) -> Any:
    """transformers' config.

    Raises:
        ConfigurationError: when it cannot be read.
    """
    from transformers import AutoConfig  # not for those who only want the files: it takes seconds

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"--model {folder}: its config cannot be read: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """All of its safetensors files, sorted.

    Raises:
        ConfigurationError: names those that are not there.
    """
    index = folder / INDEX
    names = {SINGLE}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"--model {folder}: its {index.name} cannot be read: {error!r}") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ConfigurationError(
            f"--model {folder}: not a whole checkpoint, missing: {', '.join(missing)}. Download it again."
        )
    return sorted(folder / name for name in names)


def check_fillable(config: Any, folder: Path) -> None:
    """Check that every layer of a text config takes keys and values as they are.

    Raises:
        ConfigurationError: for layers that only a real prompt can fill.
    """
    import torch

    from ollm.plugin import kv_geometry

    layers, full = config.num_hidden_layers, len(kv_geometry(config, torch.float32).layers)
    if full != layers:
        raise ConfigurationError(
            f"--model {folder}: {full} of its {layers} layers have full attention, and only those can be filled with "
            "random keys and values. Give a model whose layers all have it, such as a Llama."
        )
