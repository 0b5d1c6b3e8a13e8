"""The tests that a plugin must pass: subclass one of these classes in a test module, write one method, run pytest.

| class | its one method | tests |
|---|---|---|
| `KVStoreTests` | `open` | the contract of stores, damage, faults, crashes, reopening, and tokens of a real model |
| `SpillPolicyTests` | `plan` | what every plan must keep to |
| `OffloadPlacementTests` | `place` | what every choice of layers must keep to |
| `ModelAdapterTests` | `adapter` | that the parts of a model are found |
| `PluginTests` | none: name the distribution | entry point, light import, options, what `build` makes, the wheel |

ollm's own plugins are tested with these and with nothing else beside them. Needs the extra `testing`.
"""

from ollm.errors import MissingExtraError

try:
    import hypothesis as _  # noqa: F401
    import pytest
except ImportError:
    raise MissingExtraError("ollm.testing needs pytest and Hypothesis: pip install 'ollm-core[testing]'.") from None

# so that a failing `assert` shows both sides
pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in (
            "adapters", "blocks", "case", "contract", "damage", "faulty", "in_model", "machine", "parts",
            "placements", "plugins", "reopening", "sessions", "spill", "wheels",
        )
    )
)  # fmt: skip

from ollm.testing.adapters import ModelAdapterTests  # noqa: E402
from ollm.testing.blocks import assert_holds, random_block, read_extent, write_blocks  # noqa: E402
from ollm.testing.case import store_context  # noqa: E402
from ollm.testing.placements import OffloadPlacementTests  # noqa: E402
from ollm.testing.plugins import PluginTests  # noqa: E402
from ollm.testing.spill import SpillPolicyTests  # noqa: E402
from ollm.testing.stores import KVStoreTests  # noqa: E402

__all__ = [
    "KVStoreTests",
    "ModelAdapterTests",
    "OffloadPlacementTests",
    "PluginTests",
    "SpillPolicyTests",
    "assert_holds",
    "random_block",
    "read_extent",
    "store_context",
    "write_blocks",
]
