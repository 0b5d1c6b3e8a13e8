"""Which strategy a name means: reserved names, conflicts, qualified names, and errors that help."""

from __future__ import annotations

import sys

import pytest

from ollm.contracts.kv import KVStore
from ollm.contracts.strategy import BuildContext
from ollm.errors import AmbiguousStrategyError, PluginError, UnknownStrategyError
from ollm.registry import Kind


def offering(*names, hook="ollm_kv_stores", facts=True):
    """Code of a plugin that offers these names."""
    more = ", facts=LOSSLESS" if facts else ""
    strategies = ", ".join(f"Strategy(name={name!r}, summary='s', build=build{more})" for name in names)
    return f"@hookimpl\ndef {hook}():\n    return [{strategies}]\n"


def test_a_third_party_is_found_and_used_by_its_name(installer):
    installer.install("Acme.KV", offering("sqlite"))
    found = installer.registry()
    assert "sqlite" in found.names(Kind.KV_STORE)
    offer = found.get(Kind.KV_STORE, "sqlite")
    assert (offer.distribution, offer.qualified_name) == ("acme-kv", "acme-kv/sqlite")
    assert found.get(Kind.KV_STORE, "acme-kv/sqlite") is offer


def test_kinds_have_names_of_their_own(installer):
    installer.install("acme-kv", offering("chunked", hook="ollm_spill_policies", facts=False))
    assert installer.registry().get(Kind.SPILL_POLICY, "chunked").distribution == "acme-kv"
    assert installer.registry().get(Kind.KV_STORE, "chunked").distribution == "ollm-core"


@pytest.mark.parametrize("name", ["chunked", "paged"])
def test_a_reserved_name_means_ollms_own_or_nothing(installer, name):
    """Whether its home is installed (chunked) or not (paged): a third party never stands in for it."""
    installer.install("acme-kv", offering(name))
    found = installer.registry()
    assert f"acme-kv/{name}" in found.names(Kind.KV_STORE)
    assert found.get(Kind.KV_STORE, f"acme-kv/{name}").distribution == "acme-kv"
    if name == "chunked":
        assert found.get(Kind.KV_STORE, name).distribution == "ollm-core"
    else:
        with pytest.raises(UnknownStrategyError, match=r"The bare name is reserved; use acme-kv/paged\."):
            found.get(Kind.KV_STORE, name)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_name_offered_twice_belongs_to_nobody_whatever_the_order(installer, reverse):
    installer.install("acme-kv", offering("sqlite", "only-acme"))
    installer.install("beta-kv", offering("sqlite"))
    if reverse:
        sys.path[:2] = sys.path[1::-1]
    found = installer.registry()
    with pytest.raises(AmbiguousStrategyError, match="Use one of: acme-kv/sqlite, beta-kv/sqlite"):
        found.get(Kind.KV_STORE, "sqlite")
    assert found.get(Kind.KV_STORE, "beta-kv/sqlite").distribution == "beta-kv"
    assert {"acme-kv/sqlite", "beta-kv/sqlite", "only-acme"} < set(found.names(Kind.KV_STORE))


def test_an_unknown_name_lists_what_there_is_and_what_failed_to_load(installer, monkeypatch):
    installer.install("acme-kv", "raise RuntimeError('needs sqlite 4')")
    installer.install("beta-kv", offering("fine"), point="beta")
    monkeypatch.setenv("OLLM_DISABLE_PLUGINS", "beta")
    with pytest.raises(UnknownStrategyError) as caught:
        installer.registry().get(Kind.KV_STORE, "chonked")
    message = str(caught.value)
    assert "No KV store named 'chonked'. Available: chunked, resident. Did you mean 'chunked'?" in message
    assert "acme (acme-kv 1.0): RuntimeError: needs sqlite 4" in message
    assert "beta (beta-kv 1.0): switched off by OLLM_DISABLE_PLUGINS" in message


def test_a_name_from_an_extra_that_is_not_installed_comes_with_the_command(installer, monkeypatch):
    monkeypatch.setenv("OLLM_DISABLE_PLUGINS", "ollm-offload")
    with pytest.raises(UnknownStrategyError, match=r"ships in ollm-offload: pip install 'ollm-core\[offload\]'\."):
        installer.registry().get(Kind.OFFLOAD_PLACEMENT, "prefix")


def test_a_default_spill_policy_cannot_be_taken_away_by_a_third_party(installer):
    installer.install("acme-kv", offering("hot-tail", hook="ollm_spill_policies", facts=False))
    with pytest.raises(UnknownStrategyError, match=r"reserved; use acme-kv/hot-tail\. .* ships in ollm-kv-journal"):
        installer.registry().get(Kind.SPILL_POLICY, "hot-tail")


@pytest.mark.parametrize(
    ("name", "distribution", "extra"),
    [
        ("tiered-write-back", "ollm-kv-journal", "journal"),
        ("paged", "ollm-kv-paged", "paged"),
        ("quantized-cold-tier", "ollm-kv-quant", "quant"),
    ],
)
def test_a_store_that_is_not_installed_comes_with_the_command(installer, name, distribution, extra):
    with pytest.raises(UnknownStrategyError, match=rf"ships in {distribution}: pip install 'ollm-core\[{extra}\]'\."):
        installer.registry().get(Kind.KV_STORE, name)


@pytest.mark.parametrize("name", [None, 5, ["chunked"], ""])
def test_what_is_no_name_is_answered_with_the_names(installer, name):
    with pytest.raises(UnknownStrategyError, match=r"Available: chunked, resident\."):
        installer.registry().get(Kind.KV_STORE, name)


def test_cores_own_strategies_missing_points_at_cores_own_plugin(installer, monkeypatch):
    monkeypatch.setenv("OLLM_DISABLE_PLUGINS", "ollm-core")
    with pytest.raises(UnknownStrategyError, match="'chunked' ships in ollm-core itself: is its plugin switched off"):
        installer.registry().get(Kind.KV_STORE, "chunked")


def test_a_build_that_returns_something_else_is_refused(installer):
    installer.install("acme-kv", offering("sqlite"))
    found = installer.registry()
    with pytest.raises(PluginError, match=r"'sqlite': build\(\) returned BuildContext, it must return a KVStore"):
        found.build(found.get(Kind.KV_STORE, "sqlite"), BuildContext(None), KVStore)


def test_core_alone_offers_what_it_promises(installer):
    core = next(report for report in installer.registry().reports if report.distribution == "ollm-core")
    assert {(offer.kind, offer.strategy.name) for offer in core.offers} == {
        (Kind.KV_STORE, "resident"),
        (Kind.KV_STORE, "chunked"),
        (Kind.SPILL_POLICY, "auto"),
        (Kind.OFFLOAD_PLACEMENT, "fit"),
        (Kind.MODEL_ADAPTER, "llama"),
        (Kind.MODEL_ADAPTER, "generic"),
    }


def test_a_distribution_that_offers_a_name_twice_through_two_entry_points(installer):
    installer.install("acme-kv", offering("sqlite"))
    points = installer.paths[0] / "acme_kv-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "more = acme_kv\n")
    with pytest.raises(AmbiguousStrategyError, match="'acme-kv/sqlite' is offered twice by one distribution"):
        installer.registry().get(Kind.KV_STORE, "acme-kv/sqlite")
