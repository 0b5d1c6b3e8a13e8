"""How something goes: plugins that still use it work, and their authors are told."""

from __future__ import annotations

import warnings

import pytest

from ollm import deprecations
from ollm.contracts import hookspecs
from ollm.contracts.spill import SpillPolicy
from ollm.contracts.strategy import BuildContext
from ollm.deprecations import OllmDeprecationWarning
from ollm.registry import Kind

POLICY = """
@hookimpl
def ollm_spill_policies():
    return [Strategy(name="acme", summary="Acme's.", build=make)]


def make(context):
    from ollm.plugin import SpillPlan, SpillPolicy

    class Acme(SpillPolicy):
        def plan(self, geometry, memory, budget):
            return SpillPlan(flush_tokens=1, flush_bytes=1)

    return Acme()
"""


class RemovedIn09Warning(OllmDeprecationWarning):
    """Goes with version 0.9."""


def build(installer, name):
    registry = installer.registry()
    return registry.build(registry.get(Kind.SPILL_POLICY, name), BuildContext(None), SpillPolicy)


def test_a_plugin_with_a_deprecated_hook_works_and_is_told(installer, monkeypatch):
    notice = RemovedIn09Warning("ollm_spill_policies goes with 0.9: use ollm_policies")
    monkeypatch.setitem(hookspecs.ollm_spill_policies.ollm_spec, "warn_on_impl", notice)
    installer.install("acme", POLICY)
    report = installer.report("acme")
    assert [offer.strategy.name for offer in report.offers] == ["acme"]
    assert report.warnings == (str(notice),)


def test_a_strategy_with_a_deprecated_method_works_and_warns(installer, monkeypatch):
    notice = RemovedIn09Warning("goes with 0.9: override `plan_all`")
    monkeypatch.setitem(deprecations.METHODS, (SpillPolicy, "plan"), notice)
    installer.install("acme", POLICY)
    with pytest.warns(RemovedIn09Warning, match=r"spill policy 'acme': Acme\.plan: goes with 0\.9"):
        assert isinstance(build(installer, "acme"), SpillPolicy)


def test_nothing_is_deprecated_unless_it_is_listed(installer):
    installer.install("acme", POLICY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(installer, "acme")
    assert installer.report("acme").warnings == ()


def test_other_warnings_of_a_plugin_are_not_swallowed(installer):
    installer.install("acme", "import warnings\nwarnings.warn('of its own', UserWarning)\n" + POLICY)
    with pytest.warns(UserWarning, match="of its own"):
        registry = installer.registry()
    (report,) = (report for report in registry.reports if report.distribution == "acme")
    assert report.warnings == ()
