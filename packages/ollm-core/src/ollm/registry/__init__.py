"""Finds plugins, checks them one by one, and answers which strategy a name means. Builds nothing, imports no torch."""

from ollm.registry.catalog import Registry, registry
from ollm.registry.kinds import Kind
from ollm.registry.report import Offer, PluginReport, Status

__all__ = ["Kind", "Offer", "PluginReport", "Registry", "Status", "registry"]
