"""A third party's spill policy, found by its entry point. It flushes all the time, so that short tests use stores."""

from ollm.plugin import SpillPlan, SpillPolicy, Strategy, hookimpl

ollm_api_version = 1


class TinySpill(SpillPolicy):
    """Flush at 7 tokens and keep 2 of them hot; resident bytes as the caller's budget says."""

    def plan(self, geometry, memory, budget):
        return SpillPlan(flush_tokens=7, flush_bytes=2**40, hot_tokens=2, resident_bytes=budget or 0)


@hookimpl
def ollm_spill_policies():
    return [Strategy(name="tiny", summary="For tests.", build=lambda context: TinySpill())]
