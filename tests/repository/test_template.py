"""The template makes projects whose tests, which are the kit, pass at once; whichever kinds of strategy are chosen."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

import ollm
from repository.conftest import ROOT

copier = pytest.importorskip("copier")

TEMPLATE = ROOT / "templates" / "ollm-plugin"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
KINDS = ("kv-store", "spill-policy", "placement")
CHOICES = [(kind,) for kind in KINDS] + [("spill-policy", "placement"), KINDS]
NAMES = {"store_name": "far-away", "policy_name": "when-it-rains", "placement_name": "upstairs"}
ANSWERS = {"distribution": "acme-far-away", "author": 'Ann "A." Uthor', **NAMES}


@pytest.fixture(params=CHOICES, ids="+".join)
def project(request, tmp_path):
    """What the template makes for some kinds."""
    render(tmp_path / "project", kinds=list(request.param))
    return tmp_path / "project"


def render(target, **answers):
    copier.run_copy(str(TEMPLATE), target, data={**ANSWERS, **answers}, defaults=True, quiet=True)


def run(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kit_of(project, *arguments):
    """Install a project, as users do but for what it needs, and run its tests; what pytest printed."""
    installed = project.parent / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", "--target", str(installed), str(project))
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    pytest_command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error::UserWarning:ollm.*")
    return run(*pytest_command, *arguments, cwd=project, env={**os.environ, "PYTHONPATH": path})


def test_its_code_is_as_linters_want_it(project):
    run(sys.executable, "-m", "ruff", "check", "--select", ",".join(PYPROJECT["tool"]["ruff"]["lint"]["select"]),
        "--line-length", "120", ".", cwd=project)  # fmt: skip
    run(sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", ".", cwd=project)


def test_nothing_of_the_template_is_left_in_it(project):
    texts = {path: path.read_text(encoding="utf-8") for path in project.rglob("*") if path.is_file()}
    assert [str(path) for path, text in texts.items() if "{%" in text + str(path) or "{{" in text + str(path)] == []
    assert {path.suffix for path in texts} >= {".py", ".toml", ".md"}


def test_it_pins_this_minor_version_of_core(project):
    major, minor = map(int, ollm.__version__.split(".")[:2])
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["dependencies"] == [f"ollm-core>={major}.{minor},<{major}.{minor + 1}"]
    assert metadata["authors"] == [{"name": ANSWERS["author"]}]


def test_the_tests_of_a_project_with_everything_pass(tmp_path, shallow):
    """Its store is `chunked`, which passes them at depth elsewhere."""
    render(tmp_path / "project", kinds=list(KINDS))
    assert "passed" in kit_of(tmp_path / "project", "--hypothesis-profile=least")


def test_each_kind_has_the_name_that_was_chosen_for_it(tmp_path):
    render(tmp_path / "project", kinds=list(KINDS))
    entry = (tmp_path / "project" / "src" / "acme_far_away" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'name="([a-z-]+)"', entry) == ["far-away", "when-it-rains", "upstairs"]
    assert 'directory="kv_cache_far_away"' in entry
    render(tmp_path / "other", kinds=list(KINDS), **dict.fromkeys(NAMES, "acme-far-away"))
    entry = (tmp_path / "other" / "src" / "acme_far_away" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'name="([a-z-]+)"', entry) == ["acme-far-away"] * 3


@pytest.mark.parametrize("kind", ["kv-store", "placement"])
def test_a_project_with_one_kind_is_a_whole_plugin(kind, tmp_path):
    render(tmp_path / "project", kinds=[kind])
    assert "passed" in kit_of(tmp_path / "project", "-k", "TestPlugin")


def test_the_commands_of_the_docs_ask_nothing(tmp_path):
    """Word for word, but for where the project goes."""
    page = (ROOT / "docs" / "how-to" / "publish-a-plugin.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\$ copier (copy --defaults .*) my-plugin$", page, re.MULTILINE)
    (kinds,) = re.findall(r"`(--data 'kinds=.*?')`", page)
    for number, more in enumerate(("", kinds)):
        words = shlex.split(f"{command} {more}")
        run(sys.executable, "-m", "copier", *words, str(tmp_path / str(number)), cwd=ROOT, stdin=subprocess.DEVNULL)
    assert (tmp_path / "0" / "src" / "acme_kv" / "store.py").is_file()
    assert not (tmp_path / "1" / "src" / "acme_kv" / "store.py").exists()
    assert (tmp_path / "1" / "src" / "acme_kv" / "choices.py").is_file()


@pytest.mark.parametrize(
    "wrong", [{"distribution": "Acme KV"}, {"placement_name": "4bit"}, {"kinds": []}, {"author": " "}], ids=str
)
def test_answers_that_make_no_plugin_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"[Uu]se lower-case|Choose at least one|licence needs a name"):
        render(tmp_path / "project", **{"kinds": ["placement"], **wrong})
