"""Loading a checked local directory with transformers: safetensors only, no remote code, nothing from the network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ollm.errors import ModelDirectoryError
from ollm.seam import sizes
from ollm.seam.refusing import refusing
from ollm.seam.skeleton import FindParts, build
from ollm.weights.checkpoint import Checkpoint
from ollm.weights.shards import brief
from ollm.weights.streamer import WeightStreamer

logger = logging.getLogger("ollm")


def load_config(path: Path) -> Any:
    """The config of a model directory.

    Raises:
        ModelDirectoryError: for a model type that this transformers does not have, or that needs remote code; for a
            config that it does not accept.
    """
    with refusing(
        f"transformers cannot read {path / 'config.json'} (ollm runs no code from model directories; a model that is "
        "newer than the installed transformers needs a newer one)"
    ):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        sizes.check_has_layers(config)
        return config


def load_tokenizer(path: Path, config: Any = None) -> Any:
    """The tokenizer of a directory.

    Args:
        path: the directory.
        config: of the model that it is for, where that is another directory's.

    Raises:
        ModelDirectoryError: it cannot be loaded.
    """
    with refusing(f"transformers cannot load the tokenizer in {path}"):
        more = {} if config is None else {"config": config}
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True, **more)


def check_vocabulary(tokenizer: Any, model: Any, path: Path) -> None:
    """Check that every word of the vocabulary has an embedding: any text may hold it. Tokens that were added beside the
    vocabulary and have none occur only if somebody writes them, as the image token of text models of the Gemma family:
    these are logged.

    Raises:
        ModelDirectoryError: names a word and its number.
    """
    embeddings = model.get_input_embeddings()
    rows = getattr(getattr(embeddings, "weight", None), "shape", [0])[0]
    if not rows:
        return
    with refusing(f"The tokenizer in {path} does not say its vocabulary"):
        added = set(tokenizer.get_added_vocab())
        beyond = {word: number for word, number in tokenizer.get_vocab().items() if number >= rows}
        begins = {token for token in (tokenizer.bos_token, tokenizer.unk_token) if token is not None}
    wrong = sorted((number, word) for word, number in beyond.items() if word not in added or word in begins)
    if wrong:
        number, word = wrong[0]
        raise ModelDirectoryError(
            f"The tokenizer in {path} gives {brief(word)} the number {number}, and the model has {rows} embeddings: "
            "they do not belong together. Get the tokenizer that the model was trained with."
        )
    if beyond:
        logger.warning("%s: tokens without an embedding, which no text may hold: %s", path, brief(sorted(beyond)))


def open_checkpoint(path: Path, chosen: str | None, config: dict[str, Any]) -> Checkpoint:
    """The headers of a checked directory's weights, which its config does not contradict.

    Args:
        path: the directory.
        chosen: the file that the config names, if it does.
        config: as `config.json` says it.

    Raises:
        ModelDirectoryError: names the file and what is wrong.
    """
    checkpoint = Checkpoint.open(path, chosen)
    sizes.check_numbers(config, checkpoint)
    return checkpoint


def load_model(
    path: Path,
    *,
    config: Any,
    checkpoint: Checkpoint,
    find_parts: FindParts,
    device: torch.device,
    dtype: torch.dtype | None,
    whole: str = "",
) -> tuple[Any, WeightStreamer | None]:
    """The causal model of a directory, on `device`, ready for inference, and what streams its decoder layers.

    Where they cannot be streamed, transformers loads the whole model, and the second is `None`.

    Args:
        path: a checked model directory.
        config: what `load_config` made of it.
        checkpoint: what `open_checkpoint` found in it.
        find_parts: the decoder layers of a built model.
        device: where the model computes.
        dtype: `None` for the checkpoint's own.
        whole: why it is to be loaded whole in any case.

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
    with refusing(f"transformers cannot load the weights in {path}"):
        model, report, streamer = build(path, config, checkpoint, find_parts, device, whole, settings)
        sizes.refuse_wrong(path, sorted(report["missing_keys"]), sorted(report["mismatched_keys"]))
        return model.eval(), streamer
