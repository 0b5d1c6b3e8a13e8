"""`KVStoreTests`: everything that a KV store must pass."""

from __future__ import annotations

from ollm.testing.contract import ContractTests
from ollm.testing.damage import FilesTests
from ollm.testing.faulty import FaultsTests
from ollm.testing.in_model import ModelTests
from ollm.testing.machine import RandomOperationsTests
from ollm.testing.parts import PartsTests
from ollm.testing.reopening import ReopeningTests
from ollm.testing.sessions import SessionsTests


class KVStoreTests(
    ContractTests, RandomOperationsTests, PartsTests, FilesTests, ReopeningTests, SessionsTests, FaultsTests, ModelTests
):
    """Tests of one KV store. Write `open`; say `tolerance` for a lossy store and `window_tokens` for a windowed one.

    ```python
    class TestMyStore(KVStoreTests):
        def open(self, context):
            return MyStore(context.storage(), extent_tokens=16)
    ```
    """
