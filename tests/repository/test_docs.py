"""The documentation is complete, and what it shows was run.

Every Python block of a page is run, in order and in one namespace, in a folder with a tiny model; unless the line
before it is `<!-- not run: why -->`. A block of any language after `<!-- file: path -->` is written to that file;
writing a `pyproject.toml` with entry points does what `pip install -e .` would.
"""

from __future__ import annotations

import html
import importlib
import inspect
import logging
import os
import re
import subprocess
import sys
import tomllib

import pytest

import ollm
import ollm.errors
import ollm.plugin
import ollm.testing
from ollm.contracts import hookspecs
from ollm.registry import registry
from repository.conftest import ROOT
from repository.docs_pages import blocks, pages

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *pages(DOCS)]
HOOKS = [name for name in vars(hookspecs) if name.startswith("ollm_")]
ERRORS = [name for name, value in vars(ollm.errors).items() if inspect.isclass(value)]


def page_name(page):
    return str(page.relative_to(DOCS if DOCS in page.parents else ROOT))


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of a fresh build, warnings (broken links among them) being errors."""
    target = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", target / "doctrees"]
    done = subprocess.run([*command, DOCS, target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="session")
def reference(built):
    """The text of each built reference page by name."""

    def text(path):
        article = re.search(r"<article.*</article>", path.read_text(encoding="utf-8"), re.DOTALL)
        return html.unescape(re.sub(r"<[^>]+>", "", article[0]))

    return {path.stem: text(path) for path in (built / "reference").glob("*.html")}


def mentions(text, name):
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


@pytest.fixture
def clean_process(monkeypatch, docs_folder, shallow):
    """What a page puts on the path, imports, registers or switches on is gone afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    level = logging.getLogger("ollm").level
    registry.cache_clear()
    yield
    registry.cache_clear()
    logging.getLogger("ollm").setLevel(level)
    for name in [*sys.modules]:
        if (docs_folder / "src" / name.split(".")[0]).is_dir():
            del sys.modules[name]


def install(folder):
    """What `pip install -e .` does for discovery: metadata with the entry points, and `src` on the path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / "src" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    sys.path.insert(0, str(folder / "src"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder / "src"), os.environ.get("PYTHONPATH", "")])
    importlib.invalidate_caches()
    registry.cache_clear()


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_code_of_a_page_runs(page, docs_folder, clean_process):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.file is not None:
            target = docs_folder / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.code, encoding="utf-8")
            if target.name == "pyproject.toml":
                install(docs_folder)
        elif block.is_python and block.not_run is None:
            # as many newlines before the code as there are lines above it, so that a traceback tells the page's line
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
    reports = {report.name: str(report) for report in registry().reports if report.status.value == "broken"}
    assert not reports
    assert sorted(path.name for path in docs_folder.rglob("run-*")) == [], "a cache was left open"


def test_the_tutorial_builds_the_example():
    """File by file; but for the licence."""
    example = ROOT / "examples" / "ollm-kv-sqlite"
    built = {block.file: block.code for block in blocks(DOCS / "tutorial" / "write-a-kv-store.md") if block.file}
    present = (path for path in example.rglob("*") if path.is_file() and path.suffix in (".py", ".toml", ".md"))
    assert {str(path.relative_to(example)) for path in present} == set(built)
    for name, code in built.items():
        assert (example / name).read_text(encoding="utf-8") == code, name


def test_there_is_code_to_run():
    """The pages are found, and most of their Python is run; what docstrings show is not."""
    python = [block for page in PAGES for block in blocks(page) if block.is_python]
    written = [block for block in python if block.not_run not in ("a signature", "an example")]
    assert len(written) > 30
    assert sum(block.not_run is not None for block in written) < 5


@pytest.fixture(scope="module")
def generated():
    """The module that writes what is made from the code."""
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        return importlib.import_module("generated")
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_is_generated_is_what_the_code_says(page, generated):
    text = page.read_text(encoding="utf-8")
    assert generated.fill(text) == text, "write it anew: python docs/_ext/generated.py"


def test_everything_that_is_generated_stands_in_a_page(generated):
    asked = [name for page in PAGES for name in re.findall(r"<!-- generated: ([a-z-]+) -->", page.read_text())]
    assert sorted(asked) == sorted(generated.GENERATORS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented(hook, reference):
    signature = f"def {hook}() -> "
    assert signature in reference["hooks"]
    doc = inspect.getdoc(getattr(hookspecs, hook)).replace("`", "").splitlines()[0]
    assert doc in reference["hooks"]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_tested(hook):
    """Some test outside this folder implements or calls it."""
    tests = [path for path in (ROOT / "tests").rglob("*.py") if "repository" not in path.parts]
    assert any(mentions(path.read_text(encoding="utf-8"), hook) for path in tests)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_an_example(hook):
    assert mentions((DOCS / "how-to" / "write-a-plugin.md").read_text(encoding="utf-8"), f"def {hook}")


def test_every_public_name_is_documented(reference):
    missing = [name for name in ollm.__all__ if not mentions(reference["python-api"], name)]
    missing += [name for name in ollm.plugin.__all__ if not mentions(reference["plugin-api"], name)]
    missing += [name for name in ollm.testing.__all__ if not mentions(reference["testing"], name)]
    missing += [name for name in ERRORS if not mentions(reference["errors"], name)]
    assert not missing


@pytest.mark.parametrize("module", [ollm, ollm.plugin, ollm.testing], ids=lambda module: module.__name__)
def test_every_public_name_is_tested(module):
    """Some test outside this folder uses it."""
    tests = [path for path in (ROOT / "tests").rglob("*.py") if "repository" not in path.parts]
    text = "\n".join(path.read_text(encoding="utf-8") for path in tests)
    assert [name for name in module.__all__ if not mentions(text, name)] == []


def test_every_test_of_the_kit_is_documented(reference):
    for name in ollm.testing.__all__:
        tests = [test for test in dir(getattr(ollm.testing, name)) if test.startswith("test_")]
        assert [test for test in tests if not mentions(reference["testing"], test)] == []


def test_every_strategy_and_option_is_documented(reference):
    ours = [offer for report in registry().reports for offer in report.offers if offer.distribution.startswith("ollm-")]
    assert {offer.distribution for offer in ours} >= {"ollm-core", "ollm-offload"}
    for offer in ours:
        assert mentions(reference["strategies"], offer.strategy.name)
        assert offer.strategy.summary in reference["strategies"]
        for field in offer.strategy.options.__attrs_attrs__:
            assert mentions(reference["strategies"], field.name)


def test_paths_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:packages|tests|docs|demo|benchmarks|\.ci)/[^`<*\s]*)`", text)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []
