"""`Checkpoint`: all tensors of a model directory by name, one file or several.

Knows names and files; what a model makes of the names is not known here.
"""

from __future__ import annotations

from pathlib import Path

import attrs

from ollm.errors import ModelDirectoryError
from ollm.io import strict_json
from ollm.weights.files import WeightFile
from ollm.weights.shards import StoredTensor, read_shard

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_INDEX_BYTES = 100_000_000
"""As of a header: an index names the same tensors."""


def read_index(path: Path) -> dict[str, str]:
    """Which file of a directory holds which tensor; names of files only, never paths.

    Raises:
        ModelDirectoryError: when the index cannot be read or names something else.
    """
    try:
        with (path / INDEX).open("rb") as file:
            index = strict_json.parse(file.read(MOST_INDEX_BYTES + 1), most_bytes=MOST_INDEX_BYTES)
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"Cannot read {path / INDEX}: {error}. The download is damaged, repeat it.") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelDirectoryError(f"{path / INDEX} has no weight_map: the download is damaged, repeat it.")
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelDirectoryError(f"{path / INDEX} names {name!r}, which is not a safetensors file beside it.")
    return {tensor: str(name) for tensor, name in weight_map.items()}


@attrs.frozen(eq=False)
class Checkpoint:
    """Checked headers of all files; no tensor is read yet."""

    tensors: dict[str, StoredTensor]
    files: tuple[WeightFile, ...]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """The checkpoint in a checked model directory.

        Raises:
            ModelDirectoryError: names the file and the tensor that are wrong.
        """
        weight_map = read_index(path) if (path / INDEX).is_file() else None
        names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        shards = {name: read_shard(path / name) for name in names}
        tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
        for tensor, name in (weight_map or {}).items():
            if tensor not in shards[name]:
                raise ModelDirectoryError(
                    f"{path / name} does not hold {tensor!r}, as {path / INDEX} says: a shard was swapped or is of "
                    "another version, get the model again."
                )
            tensors[tensor] = shards[name][tensor]
        files = {id(tensor.file): tensor.file for tensor in tensors.values()}
        return cls(tensors, tuple(files.values()))

    def check_identity(self) -> None:
        """Check that no file was changed since it was opened.

        Raises:
            WeightsError: names the file.
        """
        for file in self.files:
            file.check_identity()
