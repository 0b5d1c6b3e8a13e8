"""What a plugin gets from core beside the contracts: the context of a build, the store base class, versions."""

from __future__ import annotations

import inspect
import re
import stat
from unittest import mock

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import ollm.plugin
from ollm import disk_cache
from ollm.errors import AmbiguousStrategyError, PluginError, StorageError, UnknownStrategyError
from ollm.plugin import (
    API_VERSION,
    ConfigurationError,
    Folder,
    KVBuildContext,
    KVFacts,
    SegmentedStore,
    Storage,
    StorageOptions,
    Strategy,
    kv_geometry,
    measure_memory,
    strategies,
)
from ollm.registry import Kind, Offer, PluginReport, Status, catalog, registry
from ollm.testing import assert_holds, random_block, store_context, write_blocks


class OneSegment(SegmentedStore):
    """All that a store on disk must say."""

    def place(self, key, layout):
        return 3, None


def records():
    """Every class of the contracts that has fields or attributes, with their names."""
    for name in ollm.plugin.__all__:
        value = getattr(ollm.plugin, name)
        if inspect.isclass(value) and value.__module__.startswith("ollm.contracts"):
            names = [field for field in inspect.get_annotations(value) if not field.startswith("_")]
            if names:
                yield pytest.param(value, names, id=name)


@pytest.mark.parametrize(("record", "names"), [*records()])
def test_help_says_what_every_field_means(record, names):
    """An author who has a terminal and no browser asks `help`."""
    _, _, attributes = inspect.getdoc(record).partition("Attributes:\n")
    meanings = dict(re.findall(r"^    (\w+): (\S.*)$", attributes, re.MULTILINE))
    assert [name for name in names if name not in meanings] == []
    assert set(meanings) <= set(names), "a field that there is not"


@pytest.fixture
def contexts():
    """What core gave to `build`, in order."""
    return []


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def offer(contexts):
    """`offer(facts)` makes the strategy `acme` available."""
    patches = []

    def offered(build=lambda context: OneSegment(context.storage()), **facts):
        def watched(context):
            contexts.append(context)
            return build(context)

        strategy = Strategy(
            name="acme", summary="Acme's.", build=watched, options=StorageOptions, facts=KVFacts(lossless=True, **facts)
        )
        report = PluginReport(
            name="acme", module="acme", distribution="acme", version="1", status=Status.LOADED,
            offers=(Offer(kind=Kind.KV_STORE, strategy=strategy, distribution="acme"),),
        )  # fmt: skip
        reports = (*registry().reports, report)
        registry.cache_clear()
        patches.append(mock.patch.object(catalog, "discover", lambda: reports))
        patches[-1].start()

    yield offered
    for patch in patches:
        patch.stop()
    registry.cache_clear()


def test_what_build_is_told(model, offer, contexts, tmp_path):
    offer(directory="kv_cache_acme")
    options = {"verify": "always", "min_free_bytes": 0}
    with disk_cache(model, cache_strategy="acme", cache_dir=tmp_path, options=options):
        pass
    (context,) = contexts
    assert isinstance(context, KVBuildContext)
    assert context.options == StorageOptions(verify="always", min_free_bytes=0)
    assert [(layer.kv_heads, layer.key_size, layer.itemsize) for layer in context.geometry.layers] == [(2, 8, 4)] * 2
    assert context.device == torch.device("cpu")
    assert context.window_tokens is None


@pytest.mark.parametrize("ask", ["storage", "folder"])
def test_a_store_that_said_it_uses_no_disk_gets_none(model, offer, ask):
    offer(build=lambda context: OneSegment(getattr(context, ask)()))
    with pytest.raises(PluginError, match="'acme' asks for a folder, but its facts name no `directory`"):
        disk_cache(model, cache_strategy="acme")


def test_a_folder_is_private_and_takes_only_what_will_be_removed(tmp_path):
    folder = store_context(tmp_path).folder()
    assert isinstance(folder, Folder)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    with open(folder.open_file("store-index.sqlite"), "wb") as file:  # noqa: PTH123 (a descriptor)
        assert stat.S_IMODE((folder.path / "store-index.sqlite").stat().st_mode) == 0o600
        file.write(b"something")
    for name in ("index.sqlite", "store-/../../x", "../store-x", ""):
        with pytest.raises(StorageError, match="would be left behind"):
            folder.open_file(name)
    (folder.path / "store-index.sqlite-wal").touch()
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_kept_is_found_again(tmp_path):
    """By the next context that keeps its folder, too; one that does not gets another."""
    folder = store_context(tmp_path, keep=True).folder()
    with open(folder.open_file("store-index.sqlite"), "wb") as file:  # noqa: PTH123 (a descriptor)
        file.write(b"something")
    path = folder.path
    folder.close()
    other = store_context(tmp_path).folder()
    again = store_context(tmp_path, keep=True).folder()
    assert (again.path, other.path != path) == (path, True)
    with open(again.open_file("store-index.sqlite"), "rb") as file:  # noqa: PTH123 (a descriptor)
        assert file.read() == b"something"
    other.close()
    again.close()
    assert path.exists()


def test_a_folder_that_is_dropped_goes(tmp_path):
    folder = store_context(tmp_path).folder()
    assert folder.path.exists()
    del folder
    assert list(tmp_path.iterdir()) == []


def test_a_store_on_disk_is_one_method(tmp_path):
    store = OneSegment(store_context(tmp_path).storage())
    assert isinstance(store.storage, Storage)
    blocks = [random_block(5, seed=number) for number in range(2)]
    extents = write_blocks(store, blocks)
    assert {extent.location.segment for extent in extents} == {3}
    assert_holds(store, extents, blocks)
    store.close()


def test_the_version_that_plugins_state(installer):
    installer.install("acme", "ollm_api_version = 99\n")
    assert f"was written for API version 99, this ollm-core speaks {API_VERSION}" in installer.report("acme").reason


def test_installed_strategies_by_name(installer):
    store = (
        "@hookimpl\ndef ollm_kv_stores():\n    yield Strategy(name='{}', summary='s', build=build, facts=LOSSLESS)\n"
    )
    installer.install("acme-kv", store.format("sqlite"))
    installer.install("beta-kv", store.format("chunked"))
    installer.install("gamma-kv", store.format("zip"))
    installer.install("delta-kv", store.format("zip"), point="delta")
    registry.cache_clear()
    try:
        assert {"chunked", "resident", "sqlite", "beta-kv/chunked", "gamma-kv/zip"} <= set(strategies("ollm_kv_stores"))
        found = strategies("ollm_kv_stores", ["acme-kv/sqlite", "chunked", "sqlite"])
        assert {name: strategy.name for name, strategy in found.items()} == {"sqlite": "sqlite", "chunked": "chunked"}
        with pytest.raises(UnknownStrategyError, match="Did you mean 'sqlite'"):
            strategies("ollm_kv_stores", ["sqlit"])
        with pytest.raises(AmbiguousStrategyError, match="Use one of: delta-kv/zip, gamma-kv/zip"):
            strategies("ollm_kv_stores", ["zip"])
        with pytest.raises(ConfigurationError, match="hook='ollm_commands': choose one of ollm_kv_stores, "):
            strategies("ollm_commands")
    finally:
        registry.cache_clear()


def test_what_a_config_says_of_keys_and_values():
    config = Gemma3TextConfig(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    geometry = kv_geometry(config, torch.bfloat16)
    assert [(layer.kv_heads, layer.key_size, layer.itemsize) for layer in geometry.layers] == [(2, 16, 2)]
    assert geometry.bytes_per_token == 2 * 2 * 16 * 2


def test_memory_now():
    found = measure_memory(torch.device("cpu"))
    assert 0 < found.host_free <= found.host_total
