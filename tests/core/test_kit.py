"""The kit is proven by planted bugs: each is caught by the test that is named for it, and sound plugins pass."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from core.planted.bad_choices import CAUGHT as CHOICES
from core.planted.bad_stores import CAUGHT as STORES

TESTS = Path(__file__).parents[1]
PLANTED = TESTS / "core" / "planted"
SOUND = ("TestSoundFile", "TestSoundMemory", "TestSoundWindow", "TestSoundRounding", "TestSoundChoices")


def run(arguments, report):
    """Run pytest in a process of its own; the outcome of every test by class: name, and the failure's text."""
    command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={TESTS.parent}", f"--junitxml={report}", *arguments]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
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
        for file, table in (("bad_stores.py", STORES), ("bad_choices.py", CHOICES))
        for case, (tests, _) in table.items()
        for test in tests.split("|")
    ]
    return run(named, tmp_path_factory.mktemp("kit") / "report.xml")


@pytest.mark.parametrize("case", [*STORES, *CHOICES])
def test_a_planted_bug_is_caught_by_the_test_that_is_named_for_it(case, outcomes):
    _, says = {**STORES, **CHOICES}[case]
    failures = [text for _, text in outcomes[case] if text]
    assert failures, f"{case} was not caught"
    assert any(re.search(says, text) for text in failures), failures[0][:3000]


def test_sound_plugins_pass_everything(tmp_path):
    files = [PLANTED / "bad_stores.py", PLANTED / "bad_choices.py"]
    outcomes = run([*files, "-k", " or ".join(SOUND)], tmp_path / "report.xml")
    assert set(outcomes) == set(SOUND)
    assert [(case, *failed) for case, tests in outcomes.items() for failed in tests if failed[1]] == []
    assert sum(map(len, outcomes.values())) > 200
