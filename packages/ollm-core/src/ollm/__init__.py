"""Run Hugging Face language models whose context or weights do not fit in memory; every storage choice is a plugin.

The public names are imported when first used, so that `import ollm` costs no torch import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ollm.api.cache import disk_cache
    from ollm.api.files import file_get_contents
    from ollm.api.inference import AutoInference, Inference
    from ollm.plan import CacheRequest
    from ollm.seam import TextStreamer
    from ollm.seam.cache import KVCache

__version__ = "0.1.0"

_HOMES = {
    "AutoInference": "ollm.api.inference",
    "CacheRequest": "ollm.plan",
    "Inference": "ollm.api.inference",
    "KVCache": "ollm.seam.cache",
    "TextStreamer": "ollm.seam",
    "disk_cache": "ollm.api.cache",
    "file_get_contents": "ollm.api.files",
}

__all__ = ["AutoInference", "CacheRequest", "Inference", "KVCache", "TextStreamer", "disk_cache", "file_get_contents"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
