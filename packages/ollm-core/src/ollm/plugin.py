"""Everything that a plugin may import from ollm. Importing this module imports no torch.

What is listed in `__all__` is the public contract of API version 1; anything else of core is private.
"""

from typing import TYPE_CHECKING, Any

from ollm.contracts.commands import Command
from ollm.contracts.hookspecs import API_VERSION, hookimpl
from ollm.contracts.kv import Commit, Extent, KVBlock, KVStore, StoreStats
from ollm.contracts.models import ModelAdapter, ModelParts
from ollm.contracts.offload import OffloadPlacement
from ollm.contracts.options import NoOptions, option
from ollm.contracts.spill import KVGeometry, LayerGeometry, MemorySnapshot, SpillPlan, SpillPolicy
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
    from ollm.memory import measure_memory
    from ollm.registry import strategies
    from ollm.seam.geometry import kv_geometry
    from ollm.storage.folder import RunFolder
    from ollm.storage.segments import SegmentedStorage
    from ollm.storage.store import SegmentedStore
    from ollm.storage.tensors import LayerLayout, unpack

_LATER = {
    "RunFolder": "ollm.storage.folder",
    "SegmentedStorage": "ollm.storage.segments",
    "SegmentedStore": "ollm.storage.store",
    "LayerLayout": "ollm.storage.tensors",
    "kv_geometry": "ollm.seam.geometry",
    "measure_memory": "ollm.memory",
    "strategies": "ollm.registry",
    "unpack": "ollm.storage.tensors",
}

__all__ = [
    "API_VERSION",
    "BuildContext",
    "ByteSize",
    "Command",
    "Commit",
    "ConfigurationError",
    "CorruptDataError",
    "DiskFullError",
    "Extent",
    "KVBlock",
    "KVBuildContext",
    "KVFacts",
    "KVGeometry",
    "KVStore",
    "LayerGeometry",
    "LayerLayout",
    "MemorySnapshot",
    "MissingExtraError",
    "ModelAdapter",
    "ModelParts",
    "NoOptions",
    "NonFiniteError",
    "OffloadPlacement",
    "OllmError",
    "RunFolder",
    "SegmentedStorage",
    "SegmentedStore",
    "SpillPlan",
    "SpillPolicy",
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
