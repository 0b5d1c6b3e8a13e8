"""Wrong arguments and full disks: a clear error before any work, and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from ollm import disk_cache
from ollm.errors import CacheDirectoryError, ConfigurationError, DeviceError, DiskFullError, UnknownStrategyError
from ollm.io import shim
from together.comparison import assert_close, assert_same, cache_for, generate, stock_cache, tokens
from together.tiny_models import make_model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cache_strategy": "chonked"}, UnknownStrategyError, "named 'chonked'.*chunked, .*resident.*Did you mean"),
        ({"cache_strategy": "paged", "options": {"page_tokens": 0}}, ConfigurationError, "page_tokens=0 is less"),
        ({"cache_strategy": "sliding-window-ring-buffer"}, ConfigurationError, "give the number of newest tokens"),
        (
            {"cache_strategy": "quantized-cold-tier", "options": {"representation": "int3"}},
            ConfigurationError,
            "'int3' is none of int8-symmetric-per-tensor, int8-per-token, int4",
        ),
        (
            {"cache_strategy": "log-structured-journal", "options": {"compaction_entries": 1}},
            ConfigurationError,
            "compaction_entries=1 is less than 2",
        ),
        ({"cache_dir": ""}, ConfigurationError, "cache_dir='': cache_strategy='chunked' keeps keys and values on disk"),
        ({"cache_dir": None}, ConfigurationError, "cache_dir=None"),
        ({"cache_window_tokens": 64}, ConfigurationError, "cache_window_tokens=64 with cache_strategy='chunked'"),
        ({"cache_lifecycle": "forever"}, ConfigurationError, "choose one of runtime-scoped, persistent"),
        ({"cache_lifecycle": "persistent"}, ConfigurationError, "not built yet: use 'runtime-scoped'"),
        (
            {"cache_strategy": "resident", "cache_lifecycle": "persistent"},
            ConfigurationError,
            "'persistent' with cache_strategy='resident'",
        ),
        ({"cache_strategy": "resident", "ram_budget": 5}, ConfigurationError, "keeps everything in memory"),
        ({"ram_budget": "lots"}, ConfigurationError, "ram_budget='lots' is not a size"),
        ({"ram_budget": -1}, ConfigurationError, "ram_budget=-1"),
        ({"spill_policy": "sometimes"}, UnknownStrategyError, "No spill policy named 'sometimes'.*auto"),
        ({"options": {"page_tokens": 4}}, ConfigurationError, "'chunked' has no option 'page_tokens'.*verify"),
        ({"options": {"verify": "maybe"}}, ConfigurationError, "always, first, never"),
        ({"options": {"max_disk_bytes": "big"}}, ConfigurationError, "big"),
        ({"options": "verify"}, ConfigurationError, "mapping"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_and_nothing_is_made(model, arguments, error, message, tmp_path):
    place = tmp_path / "kv"
    with pytest.raises(error, match=message):
        disk_cache(model, **{"cache_dir": place, **arguments})
    assert not place.exists()


@pytest.mark.parametrize("strategy", ["chunked", "resident"])
def test_a_model_on_a_device_that_we_cannot_copy_to_is_refused(strategy, tmp_path):
    """Here one without memory, for every machine has it."""
    model = make_model("llama").to("meta")
    with pytest.raises(DeviceError, match=r"device='meta': .* not supported"):
        disk_cache(model, cache_dir=tmp_path / "kv", cache_strategy=strategy)
    assert not (tmp_path / "kv").exists()


def test_what_is_no_decoder_is_refused(tmp_path):
    sizes = {"vocab_size": 50, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    for model, message in (
        (torch.nn.Linear(2, 2), "model=Linear: give a model that transformers loaded"),
        (T5ForConditionalGeneration(T5Config(**sizes)), "has an encoder and a decoder"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            disk_cache(model, cache_dir=tmp_path / "kv")
    assert not (tmp_path / "kv").exists()


def test_a_cache_directory_that_is_a_file_is_refused(model, tmp_path):
    (tmp_path / "kv").write_text("mine")
    with pytest.raises(CacheDirectoryError, match=r"kv.*Choose a cache_dir"):
        disk_cache(model, cache_dir=tmp_path / "kv")
    assert (tmp_path / "kv").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_foreign_folder_is_refused(model, tmp_path):
    foreign = tmp_path / "kv_cache_chunked"
    foreign.mkdir()
    os.chown(foreign, 12345, 12345)
    with pytest.raises(CacheDirectoryError, match="belongs to another user"):
        disk_cache(model, cache_dir=tmp_path)
    assert list(foreign.iterdir()) == []


def test_a_disk_limit_in_the_middle_of_a_prefill(model, tmp_path):
    """Layer 1 of 3 finds no room: the error names the bytes, and after reset() a shorter text works."""
    with cache_for(model, tmp_path, options={"max_disk_bytes": "40KiB"}) as cache:
        with pytest.raises(DiskFullError, match=r"need .*KiB more .* max_disk_bytes=40.0 KiB are taken"):
            model(tokens(1, 100), past_key_values=cache)
        cache.reset()
        assert cache.state().disk_bytes == 0
        ids = tokens(1, 16)
        assert_same(generate(model, ids, cache, new_tokens=4), generate(model, ids, stock_cache(model), new_tokens=4))
    assert list(tmp_path.iterdir()) == []


class FullDisk(shim.Disk):
    """Takes so many bytes, then none, tearing the write that reaches the end."""

    def __init__(self, room):
        self.room = room

    def pwrite(self, fd, buffer, offset):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = buffer[: self.room]
        self.room -= len(part)
        return super().pwrite(fd, part, offset)


@pytest.mark.parametrize("room", [6_000, 20_000, 33_333, 50_000])
def test_a_disk_that_fills_up_in_the_middle_of_a_prefill(model, room, tmp_path, monkeypatch):
    """Records are written in the background: if the last ones meet the end of the disk, the next call says so."""
    ids = tokens(1, 100)
    with cache_for(model, tmp_path) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(shim, "disk", FullDisk(room))
            with pytest.raises(DiskFullError, match="No space left on device"):
                model(ids, past_key_values=cache)
                cache._session.store.storage.flush()
        cache.reset()
        assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_behind_a_forward_is_an_error_once_and_loses_nothing(model, tmp_path, monkeypatch):
    """The last layer's record stays in memory; when the disk has room again the generation goes on as if nothing."""

    class LastLayerFull(shim.Disk):
        def pwrite(self, fd, buffer, offset):
            if "segment-000002" in str(Path(f"/proc/self/fd/{fd}").readlink()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().pwrite(fd, buffer, offset)

    stock = stock_cache(model)
    with cache_for(model, tmp_path) as cache:
        for used in (cache, stock):
            model(tokens(1, 20), past_key_values=used)
        cache._session.store.storage.flush()
        with monkeypatch.context() as patch:
            patch.setattr(shim, "disk", LastLayerFull())
            for used in (cache, stock):
                model(tokens(1, 9), past_key_values=used)
            with pytest.raises(DiskFullError, match="took no"):
                cache._session.store.storage.flush()
            with pytest.raises(DiskFullError, match="took no"):
                model(tokens(1, 1), past_key_values=cache)
        ids = tokens(1, 5)
        assert_close(model(ids, past_key_values=cache).logits, model(ids, past_key_values=stock).logits)
        assert cache.state().tokens == 34
