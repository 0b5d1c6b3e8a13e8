"""Loading a checked local directory with transformers: safetensors only, no remote code, nothing from the network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ollm.errors import MissingExtraError, ModelDirectoryError, OllmError
from ollm.io.ledger import ledger
from ollm.seam.names import CannotStreamError
from ollm.seam.skeleton import FindLayers, build_streamed
from ollm.weights.streamer import WeightStreamer

logger = logging.getLogger("ollm")

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load_config(path: Path) -> Any:
    """The config of a model directory.

    Raises:
        ModelDirectoryError: for a model type that this transformers does not have, or that needs remote code.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelDirectoryError(
            f"transformers cannot read {path / 'config.json'}: {error} (ollm runs no code from model directories.)"
        ) from error


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelDirectoryError(f"transformers cannot load the tokenizer in {path}: {error}") from error


def load_model(
    path: Path, *, config: Any, find_layers: FindLayers, device: torch.device, dtype: torch.dtype | None
) -> tuple[Any, WeightStreamer | None]:
    """The causal model of a directory, on `device`, ready for inference, and what streams its decoder layers.

    Where they cannot be streamed, transformers loads the whole model, and the second is `None`.

    Args:
        path: a checked model directory.
        config: what `load_config` made of it.
        find_layers: the decoder layers of a built model, in order.
        device: where the model computes.
        dtype: `None` for the checkpoint's own.

    Raises:
        ModelDirectoryError: for damaged files, and for weights that are missing or of the wrong shape: stock loading
            would fill those with random numbers.
        MemoryLimitError: what has to be in memory does not fit.
    """
    settings = {
        "dtype": dtype or "auto",
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
        "output_loading_info": True,
    }
    streamer = None
    try:
        try:
            model, report, streamer = build_streamed(path, config, find_layers, device, settings)
        except CannotStreamError as reason:
            logger.info("%s is loaded whole, its layers cannot be streamed: %s", path, reason)
            _check_fits(path, reason)
            model, report = AutoModelForCausalLM.from_pretrained(path, **settings)
            model = model.to(device)
    except OllmError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelDirectoryError(f"transformers cannot load the weights in {path}: {error}") from error
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise ModelDirectoryError(
            f"The checkpoint in {path} lacks {len(wrong)} of the model's weights, or has them in another shape: "
            f"{', '.join(wrong[:4])}{' …' if len(wrong) > 4 else ''}. Download it again."
        )
    return model.eval(), streamer


def _check_fits(path: Path, reason: Exception) -> None:
    needed = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    ledger.check(f"The weights in {path}, which cannot be streamed ({reason}),", needed, torch.device("cpu"))


def apply_adapter(model: Any, adapter_dir: Path) -> Any:
    """The model with a PEFT LoRA checkpoint applied. Optimizer states and other files beside it are ignored.

    Raises:
        MissingExtraError: when peft is not installed.
        ModelDirectoryError: when the checkpoint is incomplete or does not fit the model.
    """
    missing = [name for name in _ADAPTER_FILES if not (adapter_dir / name).is_file()]
    if missing:
        raise ModelDirectoryError(f"adapter_dir {adapter_dir} is not a PEFT checkpoint, missing: {', '.join(missing)}.")
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingExtraError("adapter_dir needs PEFT: pip install 'ollm-core[peft]'.") from None
    try:
        return PeftModel.from_pretrained(model, adapter_dir, is_trainable=False).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelDirectoryError(f"The adapter in {adapter_dir} does not fit this model: {error}") from error
