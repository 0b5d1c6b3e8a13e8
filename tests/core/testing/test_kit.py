"""The kit is proven by planted bugs: each is caught by the test that is named for it, and sound plugins pass."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import hypothesis.stateful
import pytest

from core.testing.planted import bad_choices, bad_plugins, bad_stores
from core.testing.planted.bad_choices import CAUGHT as CHOICES
from core.testing.planted.bad_files import CAUGHT as FILES
from core.testing.planted.bad_stores import CAUGHT as STORES
from ollm.testing.in_model import ModelTests

TESTS = Path(__file__).parents[2]
PLANTED = TESTS / "core" / "testing" / "planted"
TABLES = {
    "bad_stores.py": STORES,
    "bad_files.py": FILES,
    "bad_choices.py": CHOICES,
    "bad_plugins.py": bad_plugins.CAUGHT,
}
PLANTS = {case: caught for table in TABLES.values() for case, caught in table.items()}
SOUND = (
    "TestSoundFile",
    "TestSoundMemory",
    "TestSoundWindow",
    "TestSoundRounding",
    "TestSoundChoices",
    "TestSoundPlugin",
)
IN_A_MODEL = [name for name in vars(ModelTests) if name.startswith("test_")]


def run(arguments, folder):
    """Run pytest in a process of its own; the outcome of every test by class: name, and the failure's text."""
    site, projects, report = folder / "site", folder / "projects", folder / "report.xml"
    bad_plugins.make_site(site)
    (site / "planted_missing-1.0.dist-info" / "entry_points.txt").unlink()
    bad_plugins.make_projects(projects)
    path = os.pathsep.join([str(site), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PLANTED_PROJECTS": str(projects), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={TESTS.parent}", f"--junitxml={report}", *arguments]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    outcomes = {}
    for case in xml.parse(report).getroot().iter("testcase"):
        wrong = [child.get("message", "") + (child.text or "") for child in case if child.tag in ("failure", "error")]
        outcomes.setdefault(case.get("classname").split(".")[-1], []).append((case.get("name"), "\n".join(wrong)))
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of every planted bug, with the test that is named for it."""
    named = [
        f"{PLANTED / file}::{case}::{test}"
        for file, table in TABLES.items()
        for case, (tests, _) in table.items()
        for test in tests.split("|")
    ]
    return run(named, tmp_path_factory.mktemp("kit"))


@pytest.mark.parametrize("case", PLANTS)
def test_a_planted_bug_is_caught_by_the_test_that_is_named_for_it(case, outcomes):
    _, says = PLANTS[case]
    if case.startswith("TestWheel"):
        pytest.importorskip("build")
        pytest.importorskip("hatchling")
    failures = [text for _, text in outcomes[case] if text]
    assert failures, f"{case} was not caught"
    assert any(re.search(says, text) for text in failures), failures[0][:3000]


def test_sound_plugins_pass_everything(tmp_path):
    # in a model, one of them stands for all: that takes longest
    chosen = f"TestSoundFile or (({' or '.join(SOUND)}) and not ({' or '.join(IN_A_MODEL)}))"
    outcomes = run([*(PLANTED / file for file in TABLES), "-k", chosen], tmp_path)
    assert set(outcomes) == set(SOUND)
    assert [(case, *failed) for case, tests in outcomes.items() for failed in tests if failed[1]] == []
    assert sum(map(len, outcomes.values())) > 200


def test_a_busy_machine_fails_no_test_of_the_kit(monkeypatch, tmp_path):
    """Each number that Hypothesis draws takes some seconds, by its clock."""
    seconds = itertools.count()
    for module in (time, hypothesis.stateful):
        monkeypatch.setattr(module, "perf_counter", lambda: float(next(seconds)))
    choices, tried = bad_choices.TestSoundChoices(), 0
    for name in dir(choices):
        if hasattr(getattr(choices, name), "hypothesis"):
            getattr(choices, name)()
            tried += 1
    bad_choices.SoundPlacement.test_it_depends_on_its_arguments_alone(choices)
    assert tried == 7
    bad_stores.TestSoundMemory().test_random_operations(tmp_path)
