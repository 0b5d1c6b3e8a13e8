"""Everything that a plugin may import from ollm. Importing this module imports no torch.

What is listed in `__all__` is the public contract of API version 1; anything else of core is private.
"""

from typing import TYPE_CHECKING, Any

from ollm.contracts.blocks import BlockKey, Extent, KVBlock, KVLayout, Location, StoreStats
from ollm.contracts.commands import Command
from ollm.contracts.hookspecs import API_VERSION, hookimpl
from ollm.contracts.kv import KVStore
from ollm.contracts.models import ModelAdapter, ModelParts
from ollm.contracts.offload import OffloadPlacement
from ollm.contracts.options import NoOptions, option
from ollm.contracts.spill import KVGeometry, LayerGeometry, MemorySnapshot, SpillPlan, SpillPolicy
from ollm.contracts.storage import Folder, Storage
from ollm.contracts.strategy import BuildContext, KVBuildContext, KVFacts, Strategy
from ollm.errors import (
    ConfigurationError,
    CorruptDataError,
    DiskFullError,
    MissingExtraError,
    NonFiniteError,
    OllmError,
    StorageError,
    StoreContractError,
    UnsupportedOperationError,
)
from ollm.storage.options import StorageOptions
from ollm.units import ByteSize, format_size, parse_size

if TYPE_CHECKING:
    from ollm.io.ledger import measure_memory
    from ollm.registry import strategies
    from ollm.seam.geometry import kv_geometry
    from ollm.storage.store import SegmentedStore
    from ollm.storage.tensors import pack, unpack

_LATER = {
    "SegmentedStore": "ollm.storage.store",
    "kv_geometry": "ollm.seam.geometry",
    "measure_memory": "ollm.io.ledger",
    "pack": "ollm.storage.tensors",
    "strategies": "ollm.registry",
    "unpack": "ollm.storage.tensors",
}

__all__ = [
    "API_VERSION",
    "BlockKey",
    "BuildContext",
    "ByteSize",
    "Command",
    "ConfigurationError",
    "CorruptDataError",
    "DiskFullError",
    "Extent",
    "Folder",
    "KVBlock",
    "KVBuildContext",
    "KVFacts",
    "KVGeometry",
    "KVLayout",
    "KVStore",
    "LayerGeometry",
    "Location",
    "MemorySnapshot",
    "MissingExtraError",
    "ModelAdapter",
    "ModelParts",
    "NoOptions",
    "NonFiniteError",
    "OffloadPlacement",
    "OllmError",
    "SegmentedStore",
    "SpillPlan",
    "SpillPolicy",
    "Storage",
    "StorageError",
    "StorageOptions",
    "StoreContractError",
    "StoreStats",
    "Strategy",
    "UnsupportedOperationError",
    "format_size",
    "hookimpl",
    "kv_geometry",
    "measure_memory",
    "option",
    "pack",
    "parse_size",
    "strategies",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch, and the registry, when it is first used, so that entry modules stay light."""
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
