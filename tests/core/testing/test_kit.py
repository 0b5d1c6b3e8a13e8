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
SOUND = {
    "TestSoundFile": "bad_files.py",
    "TestSoundMemory": "bad_stores.py",
    "TestSoundWindow": "bad_stores.py",
    "TestSoundRounding": "bad_stores.py",
    "TestSoundChoices": "bad_choices.py",
    "TestSoundPlugin": "bad_plugins.py",
}
IN_A_MODEL = [name for name in vars(ModelTests) if name.startswith("test_")]


def nodes(cases):
    """What to tell pytest of test classes, with the tests of theirs that are wanted, or none for all."""
    homes = {case: file for file, table in TABLES.items() for case in table} | SOUND
    return [
        f"{PLANTED.relative_to(TESTS.parent) / homes[case]}::{case}{'::' if test else ''}{test}"
        for case, tests in cases.items()
        for test in tests.split("|")
    ]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of every planted bug with the test that is named for it, and of sound plugins with all, in a process of its own:
    by class, the name of every test and the text of its failure."""
    folder = tmp_path_factory.mktemp("kit")
    site, projects, report = folder / "site", folder / "projects", folder / "report.xml"
    bad_plugins.make_site(site)
    (site / "planted_notinstalled-1.0.dist-info" / "entry_points.txt").unlink()
    bad_plugins.make_projects(projects)
    path = os.pathsep.join([str(site), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PLANTED_PROJECTS": str(projects), "OMP_NUM_THREADS": "1"}
    wanted = nodes({case: tests for case, (tests, _) in PLANTS.items()} | dict.fromkeys(SOUND, ""))
    # in a model, two of them stand for all: that takes longest
    others = {*SOUND} - {"TestSoundFile", "TestSoundWindow"}
    left = [f"--deselect={node}" for node in nodes(dict.fromkeys(others, "|".join(IN_A_MODEL)))]
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=native", "--hypothesis-profile=unshrunk",
        f"--rootdir={TESTS.parent}", f"--junitxml={report}",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, *wanted, *left], cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = {}
    for case in xml.parse(report).getroot().iter("testcase"):
        wrong = [child.get("message", "") + (child.text or "") for child in case if child.tag in ("failure", "error")]
        found.setdefault(case.get("classname").split(".")[-1], []).append((case.get("name"), "\n".join(wrong)))
    return found


@pytest.mark.parametrize("case", PLANTS)
def test_a_planted_bug_is_caught_by_the_test_that_is_named_for_it(case, outcomes):
    _, says = PLANTS[case]
    if case.startswith("TestWheel"):
        pytest.importorskip("build")
        pytest.importorskip("hatchling")
    failures = [text for _, text in outcomes[case] if text]
    assert failures, f"{case} was not caught"
    assert any(re.search(says, text) for text in failures), failures[0][:3000]


def test_sound_plugins_pass_everything(outcomes):
    passed = {case: outcomes[case] for case in SOUND}
    assert [(case, *failed) for case, tests in passed.items() for failed in tests if failed[1]] == []
    assert sum(map(len, passed.values())) > 200


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
