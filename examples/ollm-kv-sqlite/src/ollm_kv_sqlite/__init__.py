"""Keys and values in one SQLite database per cache."""

import attrs

from ollm.plugin import ByteSize, KVFacts, Strategy, hookimpl, option

ollm_api_version = 1


def _at_least_one_page(_, attribute, value):
    if value < 2**16:
        raise ValueError(f"{attribute.name}={value} is less than a page of 64 KiB")


@attrs.frozen(kw_only=True)
class SQLiteOptions:
    """Options of the strategy."""

    page_cache: ByteSize = option(
        ByteSize(2**20), help="Memory for SQLite's own page cache.", validator=_at_least_one_page
    )


@hookimpl
def ollm_kv_stores():
    yield Strategy(
        name="sqlite",
        summary="Rows of one SQLite database, which any SQLite tool can look at.",
        build=build,
        options=SQLiteOptions,
        facts=KVFacts(
            lossless=True,
            directory="kv_cache_sqlite",
            downsides="SQLite copies every byte several times: half of the speed of chunked on a fast disk.",
        ),
    )


def build(context):
    from ollm_kv_sqlite.store import SQLiteStore

    return SQLiteStore(context.folder(), context.options.page_cache)
