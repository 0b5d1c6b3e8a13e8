"""`Checkpoint`: all tensors of a model directory by name, one file or several.

Chooses among the files as transformers does, so that nobody gets other weights here than there. Knows names and files;
what a model makes of the names is not known here.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import attrs

from ollm.errors import ModelDirectoryError
from ollm.io import strict_json
from ollm.weights.files import WeightFile
from ollm.weights.shards import StoredTensor, brief, read_shard

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_INDEX_BYTES = 100_000_000
"""As of a header: an index names the same tensors."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Of such files transformers would load instead of all others."""


@attrs.frozen
class WeightNames:
    """The files that hold a directory's weights."""

    files: tuple[str, ...]
    """Below the directory, in the order in which they are read: of two tensors of one name the later counts."""
    index: str = ""
    """The file that names them; empty if it is one file."""
    weight_map: dict[str, str] = attrs.field(factory=dict)
    """What the index says of each tensor. No more than a hint: what is in the files counts."""


def find_weights(path: Path, chosen: str | None = None) -> WeightNames | None:
    """The files that transformers loads from a directory, whether they are there or not; `None` if it has none.

    Args:
        path: the directory.
        chosen: what the model's config names as its weights (`transformers_weights`): one file, or an index.

    Raises:
        ModelDirectoryError: an index cannot be read, or names files elsewhere; there are weights of several kinds.
    """
    single = chosen or SINGLE
    if chosen is not None:
        _check_inside(path / "config.json", chosen, (".safetensors", ".safetensors.index.json"))
    distributed = sorted(file.name for file in path.iterdir() if _DISTRIBUTED.fullmatch(file.name))
    if distributed:
        raise ModelDirectoryError(
            f"{path} holds {distributed[0]}, a distributed checkpoint, beside what else may be its weights "
            f"({single}, {INDEX}). Such checkpoints are not read: save the model with transformers' save_pretrained()."
        )
    if single.endswith(".index.json"):
        return _read_index(path, single)
    if (path / single).is_file():
        return WeightNames((single,))
    if chosen is None and (path / INDEX).is_file():
        return _read_index(path, INDEX)
    return None if chosen is None else WeightNames((single,))


def _read_index(path: Path, name: str) -> WeightNames:
    try:
        with (path / name).open("rb") as file:
            index = strict_json.parse(
                file.read(MOST_INDEX_BYTES + 1), most_bytes=MOST_INDEX_BYTES, most_values=strict_json.MOST_VALUES
            )
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"Cannot read {path / name}: {error}. The download is damaged, repeat it.") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelDirectoryError(f"{path / name} has no weight_map: the download is damaged, repeat it.")
    files = {file for file in weight_map.values() if isinstance(file, str)}
    for file in [*sorted(files), *(value for value in weight_map.values() if not isinstance(value, str))]:
        _check_inside(path / name, file, (".safetensors",))
    return WeightNames(tuple(sorted(files)), name, weight_map)


def _check_inside(named_by: Path, name: object, endings: tuple[str, ...]) -> None:
    """Only files in the directory or in folders of it; links, as in a Hub cache, are the user's own."""
    if (
        not isinstance(name, str)
        or not name.endswith(endings)
        or "\0" in name
        or PurePosixPath(name).is_absolute()
        or ".." in PurePosixPath(name).parts
    ):
        raise ModelDirectoryError(f"{named_by} names {brief(name)}, which is not a safetensors file beside it.")


@attrs.frozen(eq=False)
class Checkpoint:
    """Checked headers of all files; no tensor is read yet."""

    tensors: dict[str, StoredTensor]
    files: tuple[WeightFile, ...]
    names: WeightNames

    @classmethod
    def open(cls, path: Path, chosen: str | None = None) -> Checkpoint:
        """The checkpoint in a checked model directory.

        Args:
            path, chosen: as for `find_weights`.

        Raises:
            ModelDirectoryError: names the file and the tensor that are wrong.
        """
        names = find_weights(path, chosen) or WeightNames((SINGLE,))
        tensors: dict[str, StoredTensor] = {}
        for name in names.files:
            tensors.update(read_shard(path / name))
        files = {id(tensor.file): tensor.file for tensor in tensors.values()}
        return cls(tensors, tuple(files.values()), names)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_identity(self) -> None:
        """Check that no file was changed since it was opened.

        Raises:
            WeightsError: names the file.
        """
        for file in self.files:
            file.check_identity()
