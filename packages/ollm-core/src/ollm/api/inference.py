"""`Inference` and `AutoInference`: direct control over a model, its cache and where its layers live.

They hold native transformers objects (`model`, `tokenizer`) and add what transformers has not: disk-backed caches,
placements, and stage timings.
"""

from __future__ import annotations

import functools
import logging as _logging
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ollm.api.cache import plan_for
from ollm.api.facts import facts_of
from ollm.api.files import file_get_contents
from ollm.api.opening import open_cache
from ollm.api.placement import Placer
from ollm.api.showing import PrefillLine, show_log
from ollm.api.signature import CacheArguments, Progress, takes
from ollm.contracts.models import ModelAdapter
from ollm.errors import ConfigurationError, ModelDirectoryError, NotLoadedError, OllmError
from ollm.io.devices import resolve_device
from ollm.io.ledger import ledger
from ollm.models.adapters import find_adapter
from ollm.models.directory import (
    CHAT_TEMPLATE,
    ModelDirectory,
    check_model_directory,
    check_sizes,
    has_tokenizer,
)
from ollm.models.references import resolve_reference
from ollm.plan import CacheRequest
from ollm.plan.placement import PlacementRecord
from ollm.plan.prompts import longest_prompt
from ollm.seam.adapters import apply_adapter, read_adapter
from ollm.seam.cache import KVCache
from ollm.seam.loading import check_vocabulary, load_config, load_model, load_tokenizer, open_checkpoint
from ollm.seam.meter import Meter
from ollm.seam.prefill import bound_prompts
from ollm.stats import Stats

if TYPE_CHECKING:
    from ollm.weights.streamer import WeightStreamer

logger = _logging.getLogger("ollm")


class _Native:
    """A model on one device with what belongs to it. Nothing is loaded until `_load`."""

    def __init__(
        self, *, device: str | torch.device, logging: bool, multimodality: bool, dtype: torch.dtype | None
    ) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigurationError(
                f"dtype={dtype!r}: give a floating-point torch.dtype, or None for the checkpoint's."
            )
        if multimodality:
            raise ConfigurationError(
                "multimodality=True: this version runs text models only. Leave it False and prompt with text."
            )
        self.device = resolve_device(device)
        self.model: Any = None
        """The transformers model."""
        self.tokenizer: Any = None
        self.processor: Any = None
        """`None` for text models."""
        self.stats = Stats()
        """Stage timings and bytes; filled while `logging` is on."""
        self.adapter: str | None = None
        """Name of the model adapter in use."""
        self._dtype = dtype
        self._logging = logging
        if logging:
            show_log()
        self._meter: Meter | None = None
        self._placer: Placer | None = None
        self._streamer: WeightStreamer | None = None

    @takes(CacheArguments)
    def DiskCache(self, request: CacheRequest, progress: Progress | None) -> KVCache:
        """A KV cache for this model, to be passed as `model.generate(past_key_values=cache)`.

        Args:
            {arguments}

        Raises:
            NotLoadedError: before a model is loaded.
            ConfigurationError, CacheDirectoryError, MemoryLimitError: as `ollm.disk_cache`.
        """
        self._check_loaded("DiskCache").decide()  # weights come first, keys and values plan with the rest
        with (
            self._meter.paused() if self._meter else nullcontext(),  # a trial run is not a generation
            self._streamer.standing_in() if self._streamer else nullcontext(),  # and needs no layer's own weights
        ):
            cache = open_cache(plan_for(self.model, request), self.model, progress or PrefillLine())
        meter = self._meter
        if meter is not None:
            meter.flush()
            self.stats.caches.append(cache.counters)
            cache.changes.make(lambda: meter.flush)  # its end is that of a generation
        self._bound_prompts(cache)
        return cache

    def _bound_prompts(self, cache: KVCache) -> None:
        """Where weights are streamed, memory is short: while the cache is open, let `generate` take a prompt that would
        not fit in parts, each of which reads the weights once. A size that the user has set stays."""
        if self.placement is None or not self.placement.streamed_bytes:
            return
        free = ledger.measure(self.device).device_free
        tokens = longest_prompt(facts_of(self.model), cache.piece_tokens, free)
        cache.changes.make(functools.partial(bound_prompts, self.model, tokens))

    def offload_layers_to_cpu(self, layers_num: int, policy: str = "auto") -> PlacementRecord:
        """Keep decoder layers in host memory and read all others from disk for each forward pass; an earlier choice
        is replaced. On a CPU these layers are then where the model computes; with CUDA they are copied to the device
        when they are needed.

        Args:
            layers_num: how many; more than there are means all.
            policy: an offload placement: `auto`, `prefix`, `suffix`, `middle-band`, `interleaved`, or a plugin's.

        Raises:
            NotLoadedError: before a model is loaded.
            ConfigurationError: for a bad count or an unknown policy; without `ollm-offload`, how to install it; after
                `offload_layers_to_gpu`.
            MemoryLimitError: the layers do not fit; nothing was read or changed.
        """
        return self._place("cpu", layers_num, policy)

    def offload_layers_to_gpu(self, layers_num: int, policy: str = "auto") -> PlacementRecord:
        """Keep decoder layers on the model's CUDA device and read all others from disk for each forward pass.

        Arguments and errors as for `offload_layers_to_cpu`, which cannot be combined with this; and

        Raises:
            DeviceError: the model is on a CPU.
        """
        return self._place("gpu", layers_num, policy)

    @property
    def placement(self) -> PlacementRecord | None:
        """Where the decoder layers are: by the last `offload_layers_to_cpu` or `offload_layers_to_gpu`, or else by the
        placement `fit`, which decides when the first cache is made or the first forward pass begins. `None` before."""
        return None if self._placer is None else self._placer.record

    def _place(self, target: str, layers_num: int, policy: str) -> PlacementRecord:
        placer = self._check_loaded(f"offload_layers_to_{target}")
        record = placer.place(target, layers_num, policy)
        if self._logging:
            logger.info("%s", record)
        return record

    def _load(self, directory: ModelDirectory, adapter_dir: Path | None) -> None:
        """Load a checked directory, or leave everything as it was."""
        began, path = time.perf_counter(), directory.path
        checkpoint = open_checkpoint(path, directory.chosen_weights, directory.config)
        config = load_config(path)
        if getattr(config, "text_config", None) is not None:
            raise ConfigurationError(
                f"{path} is a multimodal checkpoint ({config.model_type}); this version runs text models only."
            )
        name, model_adapter = find_adapter(config)
        adapter = None
        if adapter_dir is not None:
            check_sizes(adapter_dir)
            adapter = read_adapter(adapter_dir, config, checkpoint)
        tokenizer = _tokenizer(path, adapter_dir, config)
        base, streamer = load_model(
            path, config=config, checkpoint=checkpoint, find_parts=model_adapter.parts, device=self.device,
            dtype=self._dtype, whole=adapter.whole if adapter else "",
        )  # fmt: skip
        model = base if adapter is None else apply_adapter(base, adapter)
        check_vocabulary(tokenizer, model, path)
        if self._meter is not None:
            self._meter.remove()
        sizes = [] if streamer else _layer_bytes(model_adapter, base)
        self._placer, self._streamer = Placer(streamer, sizes, self.device), streamer
        self.adapter, self.tokenizer, self.model = name, tokenizer, model
        self.stats = Stats(load_seconds=time.perf_counter() - began, load_bytes=_nbytes(model))
        if streamer is not None:
            self.stats.weights = streamer.counters
        self._meter = Meter(model, self.stats) if self._logging else None
        if self._logging:
            logger.info("loaded %s with adapter '%s' in %.2f s", path, name, self.stats.load_seconds)

    def _check_loaded(self, operation: str) -> Placer:
        if self._placer is None:
            raise NotLoadedError(f"{operation}() needs a loaded model: call ini_model() first.")
        return self._placer


def _tokenizer(path: Path, adapter_dir: Path | None, config: Any) -> Any:
    """The one beside the adapter, with which it was trained, or else the model's, with the adapter's chat template."""
    if adapter_dir is not None and adapter_dir != path and has_tokenizer(adapter_dir):
        return load_tokenizer(adapter_dir, config)
    tokenizer = load_tokenizer(path)
    template = None if adapter_dir is None else adapter_dir / CHAT_TEMPLATE
    if template is not None and template.is_file():
        tokenizer.chat_template = file_get_contents(template)
    return tokenizer


def _adapter_beside(path: Path) -> Path | None:
    """The model's own directory where it holds an adapter, too, which is applied then, as transformers does."""
    return path if (path / "adapter_config.json").is_file() else None


def _layer_bytes(adapter: ModelAdapter, model: nn.Module) -> list[int]:
    try:
        return [_nbytes(layer) for layer in adapter.parts(model).layers]
    except OllmError:  # nobody knows its layers, so none can be placed
        return []


def _nbytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


class Inference(_Native):
    """A model by alias, local directory or Hub id.

    ```python
    o = Inference("llama3-1B-chat", device="cuda:0", logging=True)
    o.ini_model(models_dir="./models/", force_download=False)
    cache = o.DiskCache(cache_dir="./kv_cache/", cache_strategy="chunked")
    o.model.generate(..., past_key_values=cache, streamer=TextStreamer(o.tokenizer, skip_prompt=True))
    ```
    """

    def __init__(
        self,
        model_id: str,
        device: str | torch.device = "cuda:0",
        logging: bool = True,
        multimodality: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check the arguments; nothing is loaded before `ini_model`.

        Args:
            model_id: an alias such as `llama3-1B-chat`, a directory, or `org/name[@revision]`.
            device: one device, `cpu` or `cuda:N`, or `auto`: the first CUDA device if there is one, else the CPU.
            logging: collect `stats` and log one line per generation to the logger `ollm`, which is shown on stderr
                where the program has set no logging up.
            multimodality: must be `False` in this version.
            dtype: of the weights; the checkpoint's by default.

        Raises:
            ConfigurationError: for an unknown id (the aliases are listed) and other bad arguments.
            DeviceError: when the device is not there.
        """
        super().__init__(device=device, logging=logging, multimodality=multimodality, dtype=dtype)
        self.reference = resolve_reference(model_id)

    def ini_model(self, models_dir: str | os.PathLike[str] = "./models/", force_download: bool = False) -> None:
        """Load the model from `models_dir/<alias>`, `models_dir/<org>/<name>`, or the directory that was named.

        Raises:
            ModelDirectoryError: when the directory is missing or incomplete; lists what is missing.
            ConfigurationError: for `force_download=True`, which this version does not have.
        """
        if force_download:
            raise ConfigurationError(
                "force_download=True: this version does not download. Put the model into the directory yourself, for "
                f"example with `hf download {self.reference.hub_id or '<org/name>'} --local-dir <directory>`."
            )
        path = self.reference.directory(models_dir)
        advice = ""
        if self.reference.hub_id is not None:
            repository, _, revision = self.reference.hub_id.partition("@")
            advice = f"This version does not download; get it with: hf download {repository} --local-dir {path}" + (
                f" --revision {revision}" if revision else ""
            )
        self._load(check_model_directory(path, where_from=advice), _adapter_beside(path))


class AutoInference(_Native):
    """Any model directory that transformers can load, with an optional PEFT adapter. Loads in the constructor."""

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        adapter_dir: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cuda:0",
        multimodality: bool = False,
        logging: bool = True,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load `model_dir`.

        Args:
            model_dir: a local model directory, sharded or not.
            adapter_dir: a PEFT LoRA checkpoint as a trainer leaves it; needs `ollm-core[peft]`.
            device, multimodality, logging, dtype: as for `Inference`.

        Raises:
            ModelDirectoryError: when a directory is missing, incomplete, or does not fit.
            ConfigurationError, DeviceError, MissingExtraError: as for `Inference`, and without peft.
        """
        super().__init__(device=device, logging=logging, multimodality=multimodality, dtype=dtype)
        directory = check_model_directory(Path(model_dir))
        beside = _adapter_beside(directory.path)
        if beside is not None and adapter_dir is not None:
            raise ModelDirectoryError(
                f"{beside} holds an adapter beside the model, and adapter_dir={adapter_dir} names another. "
                "transformers applies the first by itself: move one of them elsewhere."
            )
        self._load(directory, beside if adapter_dir is None else Path(adapter_dir))
