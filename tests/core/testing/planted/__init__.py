"""Plugins that are broken on purpose: the kit must catch every one."""
