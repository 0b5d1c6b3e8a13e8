"""`ollm bench kv`, as running and showing it must know it."""

from ollm_bench.kv.plan import why_refused
from ollm_bench.kv.records import Measured
from ollm_bench.kv.verdicts import judge
from ollm_bench.run import Benchmark

BENCHMARK = Benchmark(
    module="ollm_bench.kv.case",
    measured=Measured,
    why_refused=why_refused,
    judge=judge,
    step="token",
    above="the model",
)
