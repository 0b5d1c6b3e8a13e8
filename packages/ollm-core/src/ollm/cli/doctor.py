"""`ollm doctor`: is this installation sound, and what would this machine take? Says what is wrong and what to do;
leaves everything as it is."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import importlib_metadata
import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from ollm.registry import Status, registry
from ollm.units import format_size

_DISTRIBUTION = "ollm-core"
_CHECKED = ("torch", "transformers")
_SAMPLE, _REQUEST, _THREADS = 128 * 2**20, 2**20, 8
"""What is read to measure a disk, and how; as ollm itself reads."""
_TOKEN = 32 * 8 * 128 * 2 * 2
"""Bytes of keys and values of a token: 32 layers with 8 KV heads of 128, in bfloat16."""

_Folder = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="A folder on the disk to look at; a file of 128 MiB is written there and removed.",
        show_default="the current directory",
    ),
]  # fmt: skip


def doctor(cache_dir: _Folder = Path()) -> None:
    """Check the installation: versions, devices, plugins, and other distributions that provide the module `ollm`; and
    say what memory and disk would take.

    Exit code 1 when something is wrong.
    """
    console = Console(soft_wrap=True, highlight=False)
    sound = True
    for check in (_python(), _module(), *_dependencies(), _devices(), *_plugins(), *_room(cache_dir)):
        good, text = check
        sound &= good
        console.print(Text("ok       " if good else "problem  ", style="green" if good else "bold red"), end="")
        console.print(Text(text))
    if not sound:
        raise typer.Exit(1)


def _python() -> tuple[bool, str]:
    system = platform.system()
    note = "" if system == "Linux" else f" on {system}, where ollm is not tested"
    return True, f"Python {platform.python_version()}{note}"


def _module() -> tuple[bool, str]:
    """The name `ollm` on the public index is another project's, with the same import name."""
    providers = sorted(set(importlib_metadata.packages_distributions().get("ollm", [])))
    others = [name for name in providers if name != _DISTRIBUTION]
    if others:
        return False, (
            f"the module ollm is provided by {', '.join(providers)}, which overwrite each other: "
            f"pip uninstall {' '.join(providers)}, then pip install {_DISTRIBUTION}"
        )
    return True, f"module ollm comes from {_DISTRIBUTION} {importlib_metadata.version(_DISTRIBUTION)}"


def _dependencies() -> Iterator[tuple[bool, str]]:
    wanted = {need.name: need for need in map(Requirement, importlib_metadata.requires(_DISTRIBUTION) or [])}
    for name in _CHECKED:
        try:
            version = importlib_metadata.version(name)
        except importlib_metadata.PackageNotFoundError:
            yield False, f"{name} is not installed: pip install '{wanted[name]}'"
            continue
        if wanted[name].specifier.contains(version, prereleases=True):
            yield True, f"{name} {version}"
        else:
            yield False, f"{name} {version} is outside what ollm is tested with: pip install '{wanted[name]}'"


def _devices() -> tuple[bool, str]:
    try:
        import torch
    except ImportError as error:
        return False, f"torch cannot be imported: {error}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return True, f"devices: cpu{''.join(f', cuda:{index} ({name})' for index, name in enumerate(names))}"


def _plugins() -> Iterator[tuple[bool, str]]:
    for report in registry().reports:
        if report.status is Status.BROKEN:
            yield False, f"plugin {report}. Upgrade or uninstall it, or set OLLM_DISABLE_PLUGINS={report.name}"
        else:
            yield True, f"plugin {report}"
        for warning in report.warnings:
            yield True, f"plugin {report.name}: {warning}"


def _room(folder: Path) -> Iterator[tuple[bool, str]]:
    """Memory, disk, and what would fit."""
    try:
        import torch

        from ollm.io.ledger import measure_memory
    except ImportError:  # said above
        return
    for index in range(torch.cuda.device_count()):
        found = measure_memory(torch.device("cuda", index))
        yield True, f"memory of cuda:{index}: {_of(found.device_free, found.device_total)}"
    found = measure_memory(torch.device("cpu"))
    weights = found.host_free * 3 // 4  # what the placement `fit` takes
    yield True, f"memory: {_of(found.host_free, found.host_total)}"
    fits = f"weights of about {format_size(weights)}, such as {_billions(weights)} parameters in bfloat16"
    yield True, f"memory takes {fits}; layers that do not fit are read from the disk for every token"
    try:
        rate, direct = _read_rate(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield False, f"the disk at {folder} cannot be measured: {error.strerror}. Name another folder with --cache-dir"
        return
    how = "" if direct else ", through the kernel's cache: its file system refuses unbuffered reads"
    yield True, f"disk at {folder.absolute()}: {format_size(free)} free, reads {rate / 1e9:.1f} GB/s{how}"
    tokens = free // _TOKEN // 1000 * 1000
    fits = f"keys and values of {tokens:,} tokens of a model like Llama 3 8B ({format_size(_TOKEN)} each)"
    seconds = 100_000 * _TOKEN / rate
    yield True, f"that disk takes {fits}; a step over 100,000 of them takes about {seconds:.0f} s of reading"


def _of(free: int, total: int) -> str:
    return f"{format_size(free)} free of {format_size(total)}"


def _billions(nbytes: int) -> str:
    count = nbytes / 2 / 1e9
    return f"{count:.0f} billion" if count >= 10 else f"{count:.1f} billion"


def _read_rate(folder: Path) -> tuple[float, bool]:
    """Bytes per second, and whether they came from the disk itself."""
    from ollm.io.buffers import aligned_buffer, tensor_bytes
    from ollm.io.files import DataFile, open_to_read

    with tempfile.NamedTemporaryFile(prefix="ollm-doctor-", dir=folder) as sample:
        for _ in range(_SAMPLE // 2**22):
            sample.write(os.urandom(2**22))
        sample.flush()
        os.fsync(sample.fileno())
        fd, unbuffered = open_to_read(Path(sample.name))
        try:
            file, buffer = DataFile(fd, unbuffered=unbuffered), tensor_bytes(aligned_buffer(_SAMPLE))

            def read(at: int) -> None:
                file.read(buffer[at : at + _REQUEST], at)

            with ThreadPoolExecutor(_THREADS) as threads:
                began = time.perf_counter()
                list(threads.map(read, range(0, _SAMPLE, _REQUEST)))
                return _SAMPLE / (time.perf_counter() - began), file.unbuffered
        finally:
            os.close(fd)
