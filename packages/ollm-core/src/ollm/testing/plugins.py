"""What every plugin must be: found, light, honest about itself, and complete as a wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from typer.testing import CliRunner

from ollm.cli import app
from ollm.contracts.kv import KVStore
from ollm.contracts.models import ModelAdapter
from ollm.contracts.offload import OffloadPlacement
from ollm.contracts.options import describe_options, structure_options
from ollm.contracts.spill import SpillPolicy
from ollm.contracts.strategy import BuildContext, KVBuildContext
from ollm.registry import CommandOffer, Kind, Offer, PluginReport, Status, registry
from ollm.registry.kinds import COMMANDS, RESERVED, RESERVED_COMMANDS, Home
from ollm.testing.blocks import assert_holds, random_block, read_extent, write_blocks
from ollm.testing.case import store_context
from ollm.testing.damage import FilesTests
from ollm.testing.wheels import check_wheel

_CONTRACTS: dict[Kind, type] = {
    Kind.KV_STORE: KVStore,
    Kind.SPILL_POLICY: SpillPolicy,
    Kind.OFFLOAD_PLACEMENT: OffloadPlacement,
    Kind.MODEL_ADAPTER: ModelAdapter,
}
_WINDOW = 16
_LIGHT = """
import importlib, sys
module = importlib.import_module(sys.argv[1])
for hook in sys.argv[2:]:
    list(getattr(module, hook, list)())
print(*sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "tensorflow", "jax"}))
"""


class PluginTests:
    """Tests of one plugin, installed, an editable install included. Say whose it is:

    ```python
    class TestPlugin(PluginTests):
        distribution = "acme-kv"
        project = Path(__file__).parents[1]  # the folder of pyproject.toml; without it, no wheel is built
    ```
    """

    distribution: str
    """The name in `pyproject.toml`."""
    project: Path | None = None
    """The folder of `pyproject.toml`, for the test of the wheel; needs `build` and the project's build backend."""

    @pytest.fixture
    def report(self) -> PluginReport:
        """What discovery made of the plugin."""
        reports = [report for report in registry().reports if report.distribution == self.distribution]
        assert reports, (
            f"no entry point in the group 'ollm' belongs to {self.distribution!r}: is it installed, and does its "
            "pyproject.toml have [project.entry-points.ollm]?"
        )
        assert len(reports) == 1, f"one entry point per distribution, not {[report.name for report in reports]}"
        return reports[0]

    @pytest.fixture
    def offers(self, report: PluginReport) -> tuple[Offer, ...]:
        """The strategies of the plugin."""
        assert report.status is Status.LOADED, str(report)
        return report.offers

    @pytest.fixture
    def commands(self, report: PluginReport) -> tuple[CommandOffer, ...]:
        """The commands of the plugin."""
        assert report.status is Status.LOADED, str(report)
        return report.commands

    def test_it_is_found_and_loads(self, report: PluginReport) -> None:
        """With an `ollm_api_version` that this core speaks, and hooks that it knows."""
        assert report.status is Status.LOADED, str(report)
        assert report.offers or report.commands, "its hooks offer nothing"

    def test_nothing_is_warned_of(self, report: PluginReport) -> None:
        """Such as options without a help text."""
        assert report.warnings == ()

    def test_its_entry_module_is_light(self, report: PluginReport) -> None:
        """`ollm plugins` imports it and asks its hooks: neither torch nor transformers may come with that."""
        hooks = [*(kind.value for kind in Kind), COMMANDS]
        command = [sys.executable, "-c", _LIGHT, report.module.partition(":")[0], *hooks]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [], "import what is heavy in `build`, not in the entry module"

    def test_its_names_are_its_own(self, offers: tuple[Offer, ...]) -> None:
        """A reserved name would only work in its qualified form, `distribution/name`."""
        homes = [(offer.name, RESERVED[offer.kind].get(offer.name)) for offer in offers]
        assert self._taken(homes) == [], "names that belong to ollm itself"

    def test_its_commands_have_names_of_their_own(self, commands: tuple[CommandOffer, ...]) -> None:
        """The same of commands."""
        homes = [(offer.name, RESERVED_COMMANDS.get(offer.name)) for offer in commands]
        assert self._taken(homes) == [], "names that belong to ollm itself"

    def test_options_have_defaults_that_are_valid(self, offers: tuple[Offer, ...]) -> None:
        """And texts that say what they mean; unknown ones are refused."""
        for offer in offers:
            options = offer.strategy.options
            made = structure_options(options, {}, strategy=offer.strategy.name)
            given = attrs.asdict(made, recurse=False)
            again = structure_options(options, given, strategy=offer.strategy.name)
            assert again == made, f"{offer.strategy.name}: its defaults, given as values, are others"
            for info in describe_options(options):
                assert info.help.strip(), f"{offer.strategy.name}: option {info.name} has no help text"

    def test_build_makes_what_the_hook_promises(self, offers: tuple[Offer, ...], tmp_path: Path) -> None:
        for offer in offers:
            options = structure_options(offer.strategy.options, {}, strategy=offer.strategy.name)
            built: Any = offer.strategy.build(self._context(offer, options, tmp_path))
            assert isinstance(built, _CONTRACTS[offer.kind]), f"build() of {offer.strategy.name}"
            if isinstance(built, KVStore):
                built.close()

    def test_facts_are_true(self, offers: tuple[Offer, ...], tmp_path: Path) -> None:
        """What is said of a KV store without building it: whether it is lossless, keeps all, and uses a disk."""
        for offer in offers:
            facts = offer.strategy.facts
            if facts is None:
                continue
            options = structure_options(offer.strategy.options, {}, strategy=offer.strategy.name)
            folder = tmp_path / offer.strategy.name
            store: Any = offer.strategy.build(self._context(offer, options, folder))
            name = offer.strategy.name
            try:
                assert (store.window is None) == facts.full_history, f"{name}: full_history"
                assert folder.exists() == (facts.directory is not None), f"{name}: directory"
                if facts.lossless:
                    blocks = [random_block(min(5, store.extent_tokens or 5))]
                    assert_holds(store, write_blocks(store, blocks), blocks)
            finally:
                store.close()
            registry().get(Kind.SPILL_POLICY, facts.spill_policy)

    def test_damage_is_noticed_with_the_default_options(self, offers: tuple[Offer, ...], tmp_path: Path) -> None:
        """A KV store with files, as users get it who set nothing: a byte that changed gives the right numbers or a
        typed error."""
        for offer in offers:
            if offer.strategy.facts is not None and offer.strategy.facts.directory is not None:
                case = _AsUsersGetIt(offer, tmp_path / "sound")
                case.test_a_damaged_byte_gives_right_data_or_a_typed_error(tmp_path / offer.name)

    def test_its_commands_show_their_help(self, commands: tuple[CommandOffer, ...]) -> None:
        """What each names is there, and is a typer app or a function that typer takes."""
        for offer in commands:
            shown = CliRunner().invoke(app, [registry().commands.of(offer), "--help"])
            assert shown.exit_code == 0, f"{offer.name}: {shown.exception or shown.output}"

    def test_the_wheel_is_complete(self, report: PluginReport, tmp_path: Path) -> None:
        """Built from the project: modules, entry point, a bound on ollm-core, and nothing that belongs elsewhere."""
        if self.project is None:
            pytest.skip("no `project` is named")
        check_wheel(self.project, tmp_path, self.distribution, report.module.partition(":")[0])

    def _taken(self, homes: list[tuple[str, Home | None]]) -> list[str]:
        return [name for name, home in homes if home is not None and home.distribution != self.distribution]

    @staticmethod
    def _context(offer: Offer, options: Any, folder: Path) -> BuildContext:
        if offer.kind is not Kind.KV_STORE:
            return BuildContext(options)
        facts = offer.strategy.facts
        window = None if facts is None or facts.full_history else _WINDOW
        return store_context(folder, options=options, window_tokens=window)


class _AsUsersGetIt(FilesTests):
    """A strategy's store with its own default options."""

    _has_a_cache = True

    def __init__(self, offer: Offer, folder: Path) -> None:
        self._build = offer.strategy.build
        self.options = structure_options(offer.strategy.options, {}, strategy=offer.strategy.name)
        facts = offer.strategy.facts
        self.window_tokens = None if facts is None or facts.full_history else _WINDOW
        if facts is not None and not facts.lossless:
            self.tolerance = self._lost(folder)

    def open(self, context: KVBuildContext) -> KVStore:
        store: KVStore = self._build(context)
        return store

    def _lost(self, folder: Path) -> float:
        """What a lossy store loses of these numbers, undamaged."""
        with self._filled_again(folder) as (store, table, _):
            return max(
                float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
                for extent, block in table.items()
                for read in [read_extent(store, extent)]
                for ours, theirs in ((read.keys, block.keys), (read.values, block.values))
            )
