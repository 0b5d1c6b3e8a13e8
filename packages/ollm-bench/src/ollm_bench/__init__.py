"""`ollm bench`: measures ollm against what disk and memory of this machine can do, each case in its own process.

The plugin that offers the command. `kv` measures caches and `weights` models whose layers are read from the disk; what
is here beside them serves both. It uses ollm as a user does and knows nothing of the engine's insides.
"""

from collections.abc import Iterable

from ollm.plugin import Command, hookimpl

ollm_api_version = 1


@hookimpl
def ollm_commands() -> Iterable[Command]:
    yield Command(name="bench", summary="Measure ollm on this machine.", target="ollm_bench.cli:app")
