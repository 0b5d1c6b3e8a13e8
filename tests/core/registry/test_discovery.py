"""Discovery where plugins and installations are odd. Those that are plainly broken: `test_registry_isolation`."""

from __future__ import annotations

import pytest

from ollm.registry import Kind, Status, registry

HOOK = "@hookimpl\ndef ollm_kv_stores():\n"
OFFER = HOOK + "    return [Strategy(name='acme', summary='s', build=build, facts=LOSSLESS)]\n"


def test_every_hook_of_a_plugin_is_asked(installer):
    installer.install(
        "acme-kv",
        "".join(
            f"@hookimpl\ndef {kind.value}():\n    yield Strategy(name='acme', summary='s', build=build{facts})\n"
            for kind in Kind
            for facts in [", facts=LOSSLESS" if kind is Kind.KV_STORE else ""]
        ),
    )
    report = installer.report("acme-kv")
    assert (report.name, report.module, report.version, report.reason) == ("acme", "acme_kv", "1.0", "")
    assert [offer.kind for offer in report.offers] == list(Kind)


@pytest.mark.parametrize("answer", ["pass", "return None", "return\n    yield"])
def test_a_hook_that_returns_nothing_is_broken_and_one_that_offers_nothing_is_not(installer, answer):
    """pluggy leaves `None` out of its results, so that a forgotten `return` would look like a plugin with no offers."""
    installer.install("acme-kv", f"{HOOK}    {answer}\n")
    report = installer.report("acme-kv")
    if "yield" in answer:
        assert (report.status, report.offers) == (Status.LOADED, ())
    else:
        assert report.status is Status.BROKEN
        assert report.reason == "ollm_kv_stores() returned None: it must return an iterable of `Strategy`"


def test_the_strategies_of_a_hook_that_works_are_not_offered_when_another_hook_fails(installer):
    """A plugin is loaded as a whole or not at all."""
    installer.install("acme-kv", OFFER + "@hookimpl\ndef ollm_spill_policies():\n    raise OSError('no')\n")
    assert (installer.report("acme-kv").status, installer.report("acme-kv").offers) == (Status.BROKEN, ())


def test_an_exception_that_exits_when_it_is_printed_stays_inside(installer):
    installer.install("acme-kv", "class Mute(Exception):\n    def __str__(self): raise SystemExit\nraise Mute")
    assert installer.report("acme-kv").reason.startswith("Mute: (its message cannot be printed)")


def test_options_whose_annotations_cannot_be_resolved_break_their_plugin_only(installer):
    """Such as a name that is imported under TYPE_CHECKING: the option table cannot be made."""
    installer.install(
        "acme-kv",
        "import attrs\n@attrs.frozen\nclass Options:\n    depth: 'Missing' = 3\n"
        + OFFER.replace("build=build", "build=build, options=Options"),
    )
    report = installer.report("acme-kv")
    assert report.status is Status.BROKEN
    assert "NameError: name 'Missing' is not defined" in report.reason


@pytest.mark.parametrize("metadata", [None, "Metadata-Version: 2.1\n"])
def test_a_half_removed_distribution_disturbs_nothing(installer, metadata):
    """What an interrupted `pip uninstall` leaves: entry points without METADATA, or without a name in it."""
    installer.install("acme-kv", OFFER)
    file = installer.paths[0] / "acme_kv-1.0.dist-info" / "METADATA"
    file.unlink() if metadata is None else file.write_text(metadata)
    found = installer.registry()
    assert found.get(Kind.KV_STORE, "unknown/acme").strategy.name == "acme"
    assert found.get(Kind.KV_STORE, "resident").distribution == "ollm-core"


@pytest.mark.parametrize("target", ["acme_kv:plugin", "acme_kv:missing", "no_such_module_anywhere"])
def test_an_entry_point_may_name_an_object_and_must_name_something(installer, target):
    """`plugin` is a class: hooks are static methods then."""
    installer.install(
        "acme-kv",
        "class plugin:\n    ollm_api_version = 1\n    @hookimpl\n    def ollm_kv_stores():\n"
        "        return [Strategy(name='acme', summary='s', build=build, facts=LOSSLESS)]\n",
    )
    points = installer.paths[0] / "acme_kv-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[ollm]\nacme = {target}\n")
    expected = Status.LOADED if target.endswith("plugin") else Status.BROKEN
    assert installer.report("acme-kv").status is expected


@pytest.mark.parametrize("switch", ["Acme_KV", "acme.kv", "ACME", ",acme-kv,"])
def test_a_switch_is_read_as_pip_reads_names(installer, monkeypatch, switch):
    """`acme_kv`, `Acme.KV` and `acme-kv` are one distribution, however its metadata spell it."""
    installer.install("Acme.KV", OFFER)
    monkeypatch.setenv("OLLM_DISABLE_PLUGINS", switch)
    assert installer.report("acme-kv").status is Status.DISABLED


def test_a_switch_that_names_nobody_switches_nothing_off(installer, monkeypatch):
    installer.install("acme-kv", OFFER)
    monkeypatch.setenv("OLLM_DISABLE_PLUGINS", "acme-k, kv,, ")
    assert installer.report("acme-kv").status is Status.LOADED


def test_reports_come_in_the_order_of_their_names_and_not_of_the_path(installer):
    for distribution in ("zeta", "acme-kv", "beta"):
        installer.install(distribution, OFFER)
    names = [report.distribution for report in installer.registry().reports]
    assert names == sorted(names)
    assert {"acme-kv", "beta", "zeta"} <= set(names)


def test_the_registry_is_made_once_and_looks_again_when_told(installer):
    registry.cache_clear()
    before = registry()
    installer.install("acme-kv", OFFER)
    assert registry() is before
    registry.cache_clear()
    try:
        assert "acme" in registry().names(Kind.KV_STORE)
    finally:
        registry.cache_clear()
