"""A third party's plugin, found by its entry point: a spill policy that flushes all the time, so that short tests use
stores, and a store with a window."""

import attrs

from ollm.plugin import KVFacts, SpillPlan, SpillPolicy, Strategy, hookimpl, option

ollm_api_version = 1


@attrs.frozen(kw_only=True)
class WindowOptions:
    """Options of the store."""

    sink_tokens: int = option(0, help="First tokens that stay visible.")


class TinySpill(SpillPolicy):
    """Flush at 7 tokens and keep 2 of them hot; resident bytes as the caller's budget says."""

    def plan(self, geometry, memory, budget):
        return SpillPlan(flush_tokens=7, flush_bytes=2**40, hot_tokens=2, resident_bytes=budget or 0)


def _build_window(context):
    from ollm_tiny_window import TinyWindowStore

    return TinyWindowStore(context.window_tokens, context.options.sink_tokens)


@hookimpl
def ollm_spill_policies():
    return [Strategy(name="tiny", summary="For tests.", build=lambda context: TinySpill())]


@hookimpl
def ollm_kv_stores():
    facts = KVFacts(lossless=True, full_history=False)
    return [Strategy(name="tiny-window", summary="For tests.", build=_build_window, options=WindowOptions, facts=facts)]
