"""`ollm bench weights`, as running and showing it must know it."""

from ollm_bench.run import Benchmark
from ollm_bench.weights.plan import why_refused
from ollm_bench.weights.records import Measured
from ollm_bench.weights.verdicts import judge

BENCHMARK = Benchmark(
    module="ollm_bench.weights.case",
    measured=Measured,
    why_refused=why_refused,
    judge=judge,
    step="step",
    above="the process before loading",
)
