"""A broken plugin is reported, with the reason, and disturbs nothing."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ollm.registry import Status

HOOK = "@hookimpl\ndef ollm_kv_stores():\n    "
PLACEMENTS = HOOK.replace("kv_stores", "offload_placements")
GOOD = "Strategy(name='a', summary='s', build=build, facts=LOSSLESS)"
COMMANDS = "@hookimpl\ndef ollm_commands():\n    "
CHAT = "Command(name='chat', summary='Talk.', target='acme.chat:app')"
FOLDER = GOOD.replace("LOSSLESS", "KVFacts(lossless=True, directory='kv_cache_chunked')")

BROKEN = {
    "an import that fails": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module"),
    "SystemExit": ("raise SystemExit(3)", "SystemExit: 3"),
    "MemoryError": ("raise MemoryError", "MemoryError at"),
    "a syntax error": ("def f(:", "SyntaxError: invalid syntax"),
    "a BaseException of its own": ("class Odd(BaseException): pass\nraise Odd('dear me')", "Odd: dear me at"),
    "an exception that cannot be printed": (
        "class Mute(Exception):\n  def __str__(self): raise RuntimeError\nraise Mute",
        r"Mute: \(its message cannot be printed\)",
    ),
    "a hook that raises": (HOOK + "raise ValueError('later')", r"ValueError: later at .*acme_kv\.py:"),
    "a hook that exits": (HOOK + "raise SystemExit", "SystemExit at"),
    "a generator that fails late": (HOOK + f"yield {GOOD}; 1 / 0", "ZeroDivisionError: division by zero"),
    "a generator that never ends": (
        HOOK + f"while True: yield {GOOD}",
        "offers more than 256: does it ever end",
    ),
    "no list of strategies": (HOOK + "return 7", r"ollm_kv_stores\(\) returned 7: it must return an iterable"),
    "a text": (HOOK + "return 'paged'", "returned 'paged': it must return an iterable of `Strategy`"),
    "strategies of the wrong type": (HOOK + "return ['a']", "offers 'a': it must be an `ollm.plugin.Strategy`"),
    "a KV store without facts": (
        HOOK + "return [Strategy(name='a', summary='s', build=build)]",
        r"KV store 'a' has no `facts`: give it `KVFacts\(lossless=",
    ),
    "a placement with facts": (
        PLACEMENTS + f"return [{GOOD}]",
        "placement 'a': `facts` are for KV stores only",
    ),
    "a bad name": (HOOK + "return [Strategy(name='A B', summary='s', build=build)]", "name='A B': use lower-case"),
    "no summary": (HOOK + "return [Strategy(name='a', summary='', build=build)]", "ValueError: .*summary"),
    "nothing to build with": (HOOK + "return [Strategy(name='a', summary='s', build=7)]", "build"),
    "options that are no attrs class": (
        HOOK + "return [Strategy(name='a', summary='s', build=build, options=dict)]",
        "options=<class 'dict'>: must be a class made with attrs",
    ),
    "commands of the wrong type": (COMMANDS + f"return [{GOOD}]", "it must be an `ollm.plugin.Command`"),
    "no list of commands": (COMMANDS + "pass", r"ollm_commands\(\) returned None: .* an iterable of `Command`"),
    "a command with a bad name": (
        COMMANDS + f"return [{CHAT.replace('chat', 'Chat now')}]",
        "name='Chat now': use lower",
    ),
    "a command without a summary": (COMMANDS + f"return [{CHAT.replace('Talk.', '')}]", "ValueError: .*summary"),
    "a command whose target is a path": (
        COMMANDS + f"return [{CHAT.replace('acme.chat:app', 'acme/chat.py')}]",
        "target='acme/chat.py': write 'module:function'",
    ),
    "a command whose target is the thing itself": (
        COMMANDS + "return [Command(name='a', summary='s', target=build)]",
        "write 'module:f",
    ),
    "the same command twice": (COMMANDS + f"return [{CHAT}] * 2", r"ollm_commands\(\) offers 'chat' twice"),
    "the same name twice": (HOOK + f"return [{GOOD}] * 2", r"ollm_kv_stores\(\) offers 'a' twice"),
    "a folder of ollm's own": (
        HOOK + f"return [{FOLDER}]",
        "directory 'kv_cache_chunked' belongs to ollm-core",
    ),
    "a folder outside": (
        HOOK + f"return [{FOLDER.replace('chunked', '../x')}]",
        "directory='kv_cache_../x' must look like 'kv_cache_my_store'",
    ),
    "a folder without ollm's prefix": (
        HOOK + f"return [{FOLDER.replace('kv_cache_chunked', 'mine')}]",
        "directory='mine' must look like 'kv_cache_my_store'",
    ),
    "a misspelt hook": (HOOK.replace("stores", "store") + "return []", "unknown hook 'ollm_kv_store'"),
    "no hook at all": ("", r"has no function marked with `ollm\.plugin\.hookimpl`\. The hooks: ollm_kv_stores, "),
    "no API version": ("del ollm_api_version", "states no `ollm_api_version`, this ollm-core speaks 1: upgrade it"),
    "a newer API version": ("ollm_api_version = 2", "for API version 2, this ollm-core speaks 1: upgrade ollm-core"),
    "an API version that is no number": ("ollm_api_version = 'one'", "written for API version 'one'.*upgrade it"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_reported_with_the_reason_and_disturbs_nothing(installer, fault):

    code, reason = BROKEN[fault]
    installer.install("acme-kv", code)
    installer.install(
        "beta-kv",
        f"{HOOK}        return [Strategy(name='beta', summary='s', build=build, facts=KVFacts(lossless=True))]",
    )
    reports = {report.distribution: report for report in installer.registry().reports}
    assert reports["acme-kv"].status is Status.BROKEN
    assert re.search(reason, reports["acme-kv"].reason), reports["acme-kv"].reason
    assert (reports["acme-kv"].offers, reports["acme-kv"].commands) == ((), ())
    assert "\n" not in reports["acme-kv"].reason
    assert [offer.strategy.name for offer in reports["beta-kv"].offers] == ["beta"]
    assert reports["ollm-core"].status is Status.LOADED


def test_the_users_own_ctrl_c_is_not_swallowed(installer):
    installer.install("acme-kv", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        installer.registry()


@pytest.mark.parametrize("switch", ["acme", "acme-kv", " other , acme "])
def test_a_plugin_is_switched_off_by_its_own_name_or_its_distributions(installer, monkeypatch, switch):
    installer.install("acme-kv", "raise AssertionError('was imported')")
    monkeypatch.setenv("OLLM_DISABLE_PLUGINS", switch)
    report = installer.report("acme-kv")
    assert report.status is Status.DISABLED
    assert report.reason == "switched off by OLLM_DISABLE_PLUGINS"


def test_a_heavy_entry_module_gets_a_warning(tmp_path):
    """In a process that has not imported torch yet, as `ollm plugins` is."""
    (tmp_path / "torch.py").write_text("")  # stands in for the real one, which takes seconds
    (tmp_path / "acme_kv-1.0.dist-info").mkdir()
    (tmp_path / "acme_kv-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-kv\nVersion: 1.0\n")
    (tmp_path / "acme_kv-1.0.dist-info" / "entry_points.txt").write_text("[ollm]\nacme = acme_kv\n")
    (tmp_path / "acme_kv.py").write_text(
        "import torch\nfrom ollm.plugin import hookimpl\nollm_api_version = 1\n"
        "@hookimpl\ndef ollm_kv_stores():\n    return []\n"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ollm.registry import registry\n"
        "print([report.warnings for report in registry().reports if report.name == 'acme'])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[('its entry module imports torch: move that import into `build`',)]"


def test_options_without_help_get_a_warning(installer):
    installer.install(
        "acme-kv",
        "import attrs\n@attrs.frozen\nclass Bare:\n    depth: int = 3\n"
        "@hookimpl\ndef ollm_kv_stores():\n"
        "    return [Strategy(name='a', summary='s', build=build, options=Bare, facts=LOSSLESS)]",
    )
    assert installer.report("acme-kv").warnings == (
        "option 'depth' of 'a' has no help text: make it with `ollm.plugin.option`",
    )


def test_options_that_nobody_can_set_get_a_warning(installer):
    """They were allowed before: the plugin goes on with their defaults."""
    installer.install(
        "acme-place",
        "import attrs\n@attrs.frozen\nclass Some:\n    depth: int = 3\n"
        + PLACEMENTS
        + "return [Strategy(name='a', summary='s', build=build, options=Some)]",
    )
    report = installer.report("acme-place")
    assert report.status is Status.LOADED
    assert report.warnings == ("option 'depth' of 'a' keeps its default: only options of KV stores can be set",)
