"""Options: one attrs class gives defaults, checks and tables, and text ends the same as typed values."""

from __future__ import annotations

from typing import Literal

import attrs
import pytest

from ollm.contracts.options import (
    NoOptions,
    OptionInfo,
    describe_options,
    format_parameters,
    option,
    structure_options,
)
from ollm.errors import ConfigurationError
from ollm.storage.options import StorageOptions
from ollm.units import ByteSize


def _even(_, attribute, value):
    if value % 2:
        raise ValueError(f"{attribute.name}={value} is odd")


@attrs.frozen(kw_only=True)
class Options:
    """Every type that an option may have, and both kinds of validator: one's own and attrs'."""

    page_tokens: int = option(64, help="Tokens per page.", validator=_even)
    ratio: float = option(0.5, help="A ratio.")
    eager: bool = option(False, help="Whether to hurry.")
    codec: str = option("raw", help="A name.")
    limit: ByteSize | None = option(None, help="A limit.")
    budget: ByteSize = option(ByteSize(1024), help="A budget.")
    order: Literal["lru", "fifo"] = option("lru", help="Who goes first.")
    depth: int = option(2, help="Levels.", validator=attrs.validators.in_((1, 2)))


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ({"page_tokens": 16}, {"page_tokens": "16"}),
        ({"page_tokens": 64}, {"page_tokens": " +64 "}),
        ({"page_tokens": -4}, {"page_tokens": "-4"}),
        ({"ratio": 2}, {"ratio": "2"}),
        ({"ratio": 0.25}, {"ratio": "0.25"}),
        ({"eager": True}, {"eager": "true"}),
        ({"eager": True}, {"eager": " YES "}),
        ({"eager": True}, {"eager": "1"}),
        ({"eager": False}, {"eager": "false"}),
        ({"eager": False}, {"eager": "off"}),
        ({"eager": False}, {"eager": "0"}),
        ({"codec": "zip"}, {"codec": "zip"}),
        ({"codec": "64"}, {"codec": "64"}),
        ({"budget": 2**53 + 1}, {"budget": f"{2**53 + 1}"}),
        ({"order": "fifo"}, {"order": "fifo"}),
        ({"limit": 512 * 2**20}, {"limit": "512MiB"}),
        ({"limit": None}, {}),
    ],
)
def test_text_ends_the_same_as_typed_values(typed, text):
    expected = Options(**typed)
    assert structure_options(Options, typed, strategy="s") == expected
    assert structure_options(Options, text, strategy="s") == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"page_tokens": 1.5}, "1.5 is not a whole number"),
        ({"page_tokens": True}, "True is not a whole number"),
        ({"page_tokens": "many"}, "'many' is not a whole number"),
        ({"page_tokens": "6.4"}, "'6.4' is not a whole number"),
        ({"page_tokens": "--5"}, "'--5'"),
        ({"page_tokens": None}, "None is not a whole number"),
        ({"page_tokens": 7}, "page_tokens=7 is odd"),
        ({"ratio": "half"}, "half"),
        ({"ratio": True}, "True is not a number"),
        ({"eager": 1}, "1 is not true or false"),
        ({"eager": "maybe"}, "'maybe' is not true or false"),
        ({"eager": ""}, "'' is not true or false"),
        ({"codec": 3}, "3 is not text"),
        ({"limit": -1}, "-1 is not a size"),
        ({"budget": True}, "True is not a size"),
        ({"budget": None}, "None is not a size"),
        ({"order": "random"}, "random"),
    ],
)
def test_a_value_that_does_not_fit_names_the_strategy_and_the_value(values, message):
    with pytest.raises(ConfigurationError, match=f"'acme-kv/s' does not take the options .*{message}"):
        structure_options(Options, values, strategy="acme-kv/s")


def test_of_what_an_attrs_validator_raises_only_the_message_is_told():
    """attrs raises with the attribute, the choices and the value as further arguments: no text for people."""
    with pytest.raises(ConfigurationError, match=r"options depth=3: 'depth' must be in \(1, 2\) \(got 3\)\. See"):
        structure_options(Options, {"depth": 3}, strategy="s")


@pytest.mark.parametrize("values", [None, "page_tokens=4", [("page_tokens", 4)], 7])
def test_what_is_no_mapping_is_refused(values):
    with pytest.raises(ConfigurationError, match="for 's': give a mapping of option names to values"):
        structure_options(Options, values, strategy="s")


def test_an_unknown_option_lists_the_known_ones():
    known = "page_tokens, ratio, eager, codec, limit, budget, order, depth"
    with pytest.raises(ConfigurationError, match=rf"'s' has no option 'pagetokens'\. Its options: {known}\."):
        structure_options(Options, {"pagetokens": 4}, strategy="s")
    with pytest.raises(ConfigurationError, match=r"Its options: none\."):
        structure_options(NoOptions, {"depth": 4}, strategy="s")


def test_the_table_comes_from_the_class():
    assert describe_options(Options) == (
        OptionInfo("page_tokens", "int", 64, "Tokens per page."),
        OptionInfo("ratio", "float", 0.5, "A ratio."),
        OptionInfo("eager", "bool", False, "Whether to hurry."),
        OptionInfo("codec", "str", "raw", "A name."),
        OptionInfo("limit", "ByteSize | None", None, "A limit."),
        OptionInfo("budget", "ByteSize", 1024, "A budget."),
        OptionInfo("order", "Literal['lru', 'fifo']", "lru", "Who goes first."),
        OptionInfo("depth", "int", 2, "Levels."),
    )
    assert describe_options(NoOptions) == ()


def test_a_folder_must_have_been_written_under_what_may_change_its_format():
    """Whatever a store does not say otherwise of."""

    @attrs.frozen(kw_only=True)
    class Pages(StorageOptions):
        page_tokens: int = option(64, help="Tokens per page.")
        fan_out: tuple[int, ...] = option((2, 3), help="Of a tree.")
        plain: str = "a field without a text"
        hurry: bool = option(False, help="Whether to hurry.", changes_format=False)

    options = structure_options(Pages, {"verify": "never", "page_tokens": "8", "hurry": True}, strategy="s")
    assert format_parameters(options) == {"page_tokens": 8, "fan_out": [2, 3], "plain": "a field without a text"}
    assert format_parameters(NoOptions()) == format_parameters(StorageOptions()) == {}


@pytest.mark.parametrize(
    "values", [{"verify": "sometimes"}, {"min_free_bytes": "-1"}, {"max_disk_bytes": "1 parsec"}, {"sync": True}]
)
def test_storage_options_are_checked(values):
    with pytest.raises(ConfigurationError):
        structure_options(StorageOptions, values, strategy="chunked")
