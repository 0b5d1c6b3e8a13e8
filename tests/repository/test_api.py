"""What is public stays what it was: compared with the wheels of the last release in `released/`.

`.ci/freeze-api` makes these at a release. Until then, a change that breaks plugins or callers fails here.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import griffe
import pytest

from repository.conftest import ROOT

RELEASED = Path(__file__).parent / "released"
SOURCES = ROOT / "packages" / "ollm-core" / "src"
PUBLIC_MODULES = ("ollm", "ollm.plugin", "ollm.testing")
INTENDED: dict[str, str] = {}
"""Breaking changes that are meant, by path, and why: they need a new minor version."""

LOOK = """
import inspect
import attrs
import ollm
import ollm.plugin as api

abstract, required, calls = {}, {}, {}
for name in api.__all__:
    value = getattr(api, name)
    if inspect.isabstract(value):
        abstract[name] = sorted(value.__abstractmethods__)
    if attrs.has(value):
        required[name] = [field.name for field in attrs.fields(value) if field.default is attrs.NOTHING]
for name in ollm.__all__:
    value = getattr(ollm, name)
    if value.__module__.startswith("ollm"):
        found = {name: value} if inspect.isfunction(value) else {
            f"{name}.{key}": getattr(value, key) for key in dir(value)
            if inspect.isfunction(getattr(value, key)) and (key == "__init__" or not key.startswith("_"))
        }
        for path, function in found.items():
            if (function.__module__ or "").startswith("ollm"):
                calls[path] = [[p.name, repr(p.default)] for p in inspect.signature(function).parameters.values()]
answer = {"abstract": abstract, "required": required, "calls": calls}
"""
"""What contracts ask of plugins, and what the functions of `ollm` take, as Python itself sees it: some signatures are
made from records."""

MADE_BY_CORE = {
    "BlockKey", "BuildContext", "Extent", "KVBuildContext", "KVGeometry", "KVLayout", "LayerGeometry", "MemorySnapshot",
}  # fmt: skip
"""Records that plugins only read: core may add what it fills in itself."""

USE_THE_OLD_PLUGIN = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ollm import disk_cache
from ollm.registry import registry

(report,) = [report for report in registry().reports if report.distribution == "acme-kv"]
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=300, initializer_range=0.25)).eval()
model.generation_config.eos_token_id = None
prompt = torch.arange(3, 103)[None]
expected = model.generate(prompt, max_new_tokens=20, do_sample=False)
same = []
for arguments in (
    {"cache_strategy": "zlib-memory", "spill_policy": "small-tail"},
    {"cache_strategy": "one-file", "cache_dir": sys.argv[1], "ram_budget": 0},
):
    with disk_cache(model, **arguments) as cache:
        same.append(model.generate(prompt, max_new_tokens=20, do_sample=False, past_key_values=cache).equal(expected))
        assert cache.state().persisted_tokens > 0
answer = {"status": str(report.status.value), "warnings": report.warnings, "same": same,
    "offers": sorted(offer.strategy.name for offer in report.offers)}
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folders with the contents of the released wheels, by distribution."""
    folders = {}
    for wheel in RELEASED.glob("*.whl"):
        folder = tmp_path_factory.mktemp("released")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        folders[wheel.name.split("-")[0]] = folder
    return folders


@pytest.fixture(scope="module")
def answers(released):
    """What `LOOK` finds in core of the last release, and here."""
    here = {}
    exec(LOOK, here)
    return ask(LOOK, path=[released["ollm_core"]]), here["answer"]


@pytest.fixture(scope="module")
def before(released):
    """Core of the last release, as griffe reads it."""
    return griffe.load("ollm", search_paths=[released["ollm_core"]])


def ask(script, *arguments, path):
    """The `answer` of a script, in a process with these folders first on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{script}\nimport json; print(json.dumps(answer))", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def public_paths(package):
    """Where the public names are defined."""
    found = set()
    for name in PUBLIC_MODULES:
        module = package if name == "ollm" else package[name.removeprefix("ollm.")]
        for member in (module.members[export] for export in module.exports):
            with contextlib.suppress(griffe.AliasResolutionError):  # another library's, which we only hand on
                found.add(member.canonical_path)
    return found


def breaking_changes(before, folder):
    """What would break users of public names, by path, between core as it was and what is in a folder."""
    after = griffe.load("ollm", search_paths=[folder])
    public = public_paths(before)
    assert len(public) > 40
    return {
        breakage.obj.canonical_path: breakage.explain(griffe.ExplanationStyle.ONE_LINE)
        for breakage in griffe.find_breaking_changes(before, after)
        if any(f"{breakage.obj.canonical_path}.".startswith(f"{path}.") for path in public)
    }


def test_no_public_name_changed_in_a_way_that_breaks_its_users(before):
    broken = breaking_changes(before, SOURCES)
    assert {path: why for path, why in broken.items() if path not in INTENDED} == {}


CHANGES = [
    ("contracts/kv.py", "def write(self, block:", "def write(self, data:", "contracts.kv.KVStore.write"),
    ("contracts/kv.py", "    def adopt(", "    def go_on(", "contracts.kv.KVStore.adopt"),
    ("contracts/spill.py", " flush_tokens: int,", " tokens: int,", "contracts.spill.SpillPlan.for_memory"),
    ("api/inference.py", " adapter_dir: str", " peft_dir: str", "api.inference.AutoInference.__init__"),
]


def test_every_breaking_change_is_found(released, before, tmp_path):
    shutil.copytree(released["ollm_core"] / "ollm", tmp_path / "ollm")
    for file, old, new, _ in CHANGES:
        changed = tmp_path / "ollm" / file
        text = changed.read_text(encoding="utf-8")
        assert old in text
        changed.write_text(text.replace(old, new), encoding="utf-8")
    assert {f"ollm.{path}" for *_, path in CHANGES} == {*breaking_changes(before, tmp_path)}


def test_what_people_call_takes_what_it_took(answers):
    """By name and by position; new arguments come last and have defaults."""
    old, new = (answer["calls"] for answer in answers)
    assert len(old) > 15
    assert [name for name, _ in old["Inference.DiskCache"]][:3] == ["self", "cache_dir", "cache_strategy"]
    assert {path: new.get(path, [])[: len(parameters)] for path, parameters in old.items()} == old
    more = [parameter for path in old for parameter in new[path][len(old[path]) :]]
    assert [name for name, default in more if default == repr(inspect.Parameter.empty)] == []


def test_contracts_ask_no_more_of_plugins(answers):
    """No new abstract method, and no new field that a plugin would have to fill in."""
    old, new = answers
    assert len(old["abstract"]) == 6
    for name, methods in old["abstract"].items():
        assert set(new["abstract"][name]) <= set(methods), f"{name}: a new method needs a default"
    for name, fields in old["required"].items():
        if name not in MADE_BY_CORE:
            assert set(new["required"][name]) <= set(fields), f"{name}: a new field needs a default"


def test_a_plugin_of_the_last_release_works_unchanged(released, tmp_path):
    """All four kinds of strategies, as a wheel that was built then."""
    answer = ask(USE_THE_OLD_PLUGIN, tmp_path, path=[released["acme_kv"], SOURCES])
    assert answer == {
        "status": "loaded",
        "warnings": [],
        "same": [True, True],
        "offers": ["acme-qwen3", "every-other", "one-file", "small-tail", "zlib-memory"],
    }
