"""The ways to run a model that are compared: how each is loaded, and how it takes one step. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from transformers import AutoModelForCausalLM, StaticCache

from ollm import AutoInference
from ollm_bench.contexts import (
    TOKEN,
    decode_one,
    fill_by_layers,
    fill_by_pieces,
    piece_tokens,
    random_keys_and_values,
    wait_for_disk,
)
from ollm_bench.weights.checkpoints import parts_of, skeleton
from ollm_bench.weights.records import Request

_PLACEMENT = "fit"
"""Which layers are resident where their number is given: spread evenly."""
_ROOM = 64
"""Tokens that a cache has room for beside those that it is filled with."""


@attrs.define
class Subject:
    """A loaded model, with the cache that it works with, if any. Counts nothing: only ollm does."""

    model: Any
    cache: Any = None

    @property
    def weights_read(self) -> int:
        """Bytes of weights read so far, as ollm counts."""
        return 0

    @property
    def kv_read(self) -> int:
        """Bytes of keys and values read so far, as ollm counts."""
        return 0

    @property
    def remark(self) -> str:
        """What is worth telling of how it was loaded."""
        return ""

    @property
    def mode(self) -> str:
        """Of ollm's cache."""
        return ""

    def close(self) -> None:
        """Remove what it wrote."""

    def step(self) -> None:
        """Take one token, after all that is in the cache; one that is empty waits for a prompt."""
        if self.cache is None or not self.cache.get_seq_length():
            self.model(torch.tensor([[TOKEN]]), use_cache=False)
        else:
            decode_one(self.model, self.cache)

    def take_prompt(self, tokens: int) -> None:
        """Take a prompt of random tokens at once."""
        prompt = torch.randint(self.model.config.vocab_size, (1, tokens))
        more = {"use_cache": False} if self.cache is None else {"past_key_values": self.cache}
        self.model(prompt, logits_to_keep=1, **more)


@attrs.define
class _Ours(Subject):
    """ollm's own, which counts."""

    inference: AutoInference = attrs.field(kw_only=True)

    @property
    def weights_read(self) -> int:
        return self.inference.stats.weights.read_bytes

    @property
    def kv_read(self) -> int:
        return int(self.cache.state().bytes_read) if self.cache is not None else 0

    @property
    def remark(self) -> str:
        placed = self.inference.placement
        if placed is None or placed.requested_layers is not None:
            return ""
        return f"{len(placed.layer_indices)} of {placed.total_layers} layers resident"

    @property
    def mode(self) -> str:
        return str(self.cache.state().mode) if self.cache is not None else ""

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()


def load(request: Request, say: Callable[[str], None]) -> Subject:
    """The subject of a case, with its cache filled."""
    say("loading the model")
    subject = {"memory": _in_memory, "mapped": _mapped, "accelerate": _accelerate, "ollm": _ollm}[request.case.kind](
        request
    )
    if request.case.kv_tokens:
        _fill(subject, request, lambda share: say(f"filling {share:.0%}"))
    return subject


def _in_memory(request: Request) -> Subject:
    """As transformers loads it, and then every parameter copied out of the mapped files."""
    subject = _mapped(request)
    for weight in subject.model.parameters():
        weight.data = weight.data.clone()
    if request.case.kv_tokens:
        room = request.case.kv_tokens + request.steps + _ROOM
        subject.cache = StaticCache(config=subject.model.config, max_cache_len=room)
    return subject


def _mapped(request: Request) -> Subject:
    """As transformers loads it on a CPU: parameters are views of the mapped files, and the kernel reads pages when they
    are touched."""
    return Subject(_from_pretrained(request))


def _accelerate(request: Request) -> Subject:
    """All decoder layers on the disk, the rest in memory. The files are used where they are."""
    bare = skeleton(request.geometry.model)
    prefix = parts_of(bare).key_prefix
    places = {
        name: "cpu"
        for name, module in bare.named_modules()
        if not name.startswith(prefix) and not list(module.children())
    }
    places |= {f"{prefix}{index}": "disk" for index in range(len(request.geometry.layer_bytes))}
    return Subject(_from_pretrained(request, device_map=places, offload_folder=request.folder))


def _from_pretrained(request: Request, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        request.geometry.model, dtype="auto", local_files_only=True, use_safetensors=True, **more
    ).eval()


def _ollm(request: Request) -> Subject:
    case = request.case
    ours = AutoInference(request.geometry.model, device="cpu", logging=False)
    if case.resident is not None:
        ours.offload_layers_to_cpu(case.resident, policy=_PLACEMENT)
    cache = None
    if case.kv_tokens or case.prompt:
        cache = ours.DiskCache(request.folder, cache_strategy="chunked", ram_budget=0)
    return _Ours(ours.model, cache, inference=ours)


def _fill(subject: Subject, request: Request, done: Callable[[float], None]) -> None:
    tokens = request.case.kv_tokens
    if request.case.kind == "memory":
        keys, values = random_keys_and_values(subject.model, tokens)
        fill_by_layers(subject.cache, subject.model, keys, values, done)
        return
    layer = request.geometry.kv_bytes_per_token // len(request.geometry.layer_bytes)
    keys, values = random_keys_and_values(subject.model, min(piece_tokens(layer), tokens))
    fill_by_pieces(subject.cache, subject.model, keys, values, tokens, done)
    wait_for_disk(subject.cache.state().directory)
