"""`ollm plugins`: what is installed, what it offers, and what is broken and why."""

from __future__ import annotations

import json
from typing import Annotated, Any

import attrs
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ollm.contracts.options import OptionInfo, describe_options
from ollm.contracts.strategy import KVFacts
from ollm.registry import Kind, Offer, PluginReport, Registry, Status, registry
from ollm.storage.options import StorageOptions
from ollm.units import format_size

_STYLES = {Status.LOADED: "green", Status.BROKEN: "bold red", Status.DISABLED: "yellow"}


def plugins(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print options and downsides.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with everything that -v prints.")] = False,
) -> None:
    """List every plugin with its distribution, version, strategies and commands; for broken ones, the reason.

    Exit code 0, also when plugins are broken: they are reported and disturb nothing.
    """
    found = registry()
    if as_json:
        listing = {"plugins": [_as_dict(found, report) for report in found.reports]}
        typer.echo(json.dumps(listing, indent=2, default=str))  # an option's default may be anything
        return
    console = Console(soft_wrap=True, highlight=False)
    for index, report in enumerate(found.reports):
        if index:
            console.print()
        _print_report(console, found, report, verbose)
    if verbose:
        console.print(Text("\nOptions of storage, which all stores have that say so:", style="bold"))
        for info in describe_options(StorageOptions):
            console.print(Text(f"  {_option(info)}", style="dim"))


def _print_report(console: Console, found: Registry, report: PluginReport, verbose: bool) -> None:
    head = Text(f"{report.distribution} {report.version}", style="bold")
    head.append(f"  plugin '{report.name}' in {report.module}: ", style="not bold")
    head.append(report.status.value, style=_STYLES[report.status])
    console.print(head)
    if report.reason:
        console.print(Text(f"  {report.reason}"))
    for warning in report.warnings:
        console.print(Text(f"  warning: {warning}", style="yellow"))
    lines = [
        (_line(offer.kind.label, found.name_of(offer), offer.strategy.summary), _details(offer))
        for offer in report.offers
    ]
    lines += [
        (_line(found.commands.label, found.commands.of(command), command.command.summary), [])
        for command in report.commands
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for line, details in lines:
        if verbose:
            console.print(Text("  ").join([Text(), *line]))
            for detail in details:
                console.print(Text(f"      {detail}", style="dim"))
        else:
            table.add_row(*line)
    if table.row_count:
        console.print(table)


def _line(what: str, name: str, summary: str) -> tuple[Text, Text, Text]:
    return Text(what, style="dim"), Text(name, style="cyan"), Text(summary)


def _details(offer: Offer) -> list[str]:
    lines = []
    facts = offer.strategy.facts
    if facts is not None:
        lines.append(f"{_kept(facts)}; folder: {facts.directory or 'none'}; spill policy: {facts.spill_policy}")
        if facts.downsides:
            lines.append(f"downsides: {facts.downsides}")
    options, common = describe_options(offer.strategy.options), describe_options(StorageOptions)
    lines += [f"option {_option(info)}" for info in options if info not in common]
    if any(info in common for info in options):
        lines.append("options of storage: see the end")
    return lines


def _kept(facts: KVFacts) -> str:
    """What becomes of keys and values."""
    if facts.full_history:
        return "lossless" if facts.lossless else "not lossless: gives back other numbers than it is given"
    kept = "what it keeps is exact" if facts.lossless else "what it keeps comes back as other numbers"
    return f"not lossless: keeps a window and forgets what is older; {kept}"


def _option(info: OptionInfo) -> str:
    default = info.default
    if info.type.startswith("ByteSize") and isinstance(default, int):
        default = format_size(default)
    return f"{info.name} ({info.type}, default {default}): {info.help}"


def _as_dict(found: Registry, report: PluginReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "module": report.module,
        "distribution": report.distribution,
        "version": report.version,
        "status": report.status.value,
        "reason": report.reason or None,
        "warnings": list(report.warnings),
        "strategies": [_strategy_as_dict(found, offer) for offer in report.offers],
        "commands": [
            {
                "name": found.commands.of(offer),
                "qualified_name": offer.qualified_name,
                "summary": offer.command.summary,
            }
            for offer in report.commands
        ],
    }


def _strategy_as_dict(found: Registry, offer: Offer) -> dict[str, Any]:
    facts = offer.strategy.facts
    return {
        "kind": Kind(offer.kind).label,
        "name": found.name_of(offer),
        "qualified_name": offer.qualified_name,
        "summary": offer.strategy.summary,
        "facts": attrs.asdict(facts) if facts else None,
        "options": [
            {"name": info.name, "type": info.type, "default": info.default, "help": info.help}
            for info in describe_options(offer.strategy.options)
        ],
    }
