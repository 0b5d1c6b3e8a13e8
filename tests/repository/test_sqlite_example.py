"""The store of the tutorial, where no clause of the kit says what it must do."""

from __future__ import annotations

import importlib.util
import sqlite3

import pytest
import torch

from ollm.errors import StorageError
from ollm.plugin import BlockKey, KVLayout
from ollm.storage.folder import CacheFolder
from ollm.testing import random_block, store_context, write_blocks
from repository.conftest import ROOT


@pytest.fixture(scope="module")
def module():
    path = ROOT / "examples" / "ollm-kv-sqlite" / "src" / "ollm_kv_sqlite" / "store.py"
    spec = importlib.util.spec_from_file_location("sqlite_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_counters_can_be_read_after_it_was_closed(module, tmp_path):
    store = module.SQLiteStore(store_context(tmp_path).folder())
    write_blocks(store, [random_block(4)])
    before = store.stats()
    store.close()
    assert (store.stats().bytes_written, store.stats().disk_bytes) == (before.bytes_written, 0)


def test_a_database_that_cannot_be_closed_leaves_no_folder_locked(module, tmp_path):
    folder = store_context(tmp_path, keep=True).folder()
    store = module.SQLiteStore(folder)
    real = store._database

    class Broken:
        def close(self):
            raise sqlite3.OperationalError("disk I/O error")

    store._database = Broken()
    with pytest.raises(StorageError, match=r"Cannot close .*: disk I/O error"):
        store.close()
    real.close()
    CacheFolder.open(folder.path).close()


def test_what_a_row_says_is_text_of_its_own(module):
    """Not how a record of ollm's prints, which may be otherwise in the next version that goes on with the file."""
    layout = KVLayout(torch.bfloat16, 3, 8, 4)
    assert (
        module._what(BlockKey(1, 2, 16, 8, 5), layout)
        == "layer 1, branch 2, tokens 16..24, 5 rows, 3 heads of 8+4 bfloat16"
    )
