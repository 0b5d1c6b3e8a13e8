"""Finds plugins, checks each alone, and answers what a name means. Builds nothing, imports no torch."""

from ollm.registry.catalog import Registry, registry, strategies
from ollm.registry.kinds import Kind
from ollm.registry.report import CommandOffer, Offer, PluginReport, Status

__all__ = ["CommandOffer", "Kind", "Offer", "PluginReport", "Registry", "Status", "registry", "strategies"]
