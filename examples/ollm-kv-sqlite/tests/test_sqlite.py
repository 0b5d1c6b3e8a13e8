"""The kit."""

from pathlib import Path

from ollm.testing import KVStoreTests, PluginTests
from ollm_kv_sqlite.store import SQLiteStore


class TestSQLite(KVStoreTests):
    def open(self, context):
        return SQLiteStore(context.folder(), page_cache=2**16)  # small, so that the file is really read


class TestPlugin(PluginTests):
    distribution = "ollm-kv-sqlite"
    project = Path(__file__).parents[1]
