"""What the GPU kernels' compiler did in this process, as Prometheus counters."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from kernels.compiled import compiled

SOURCES = ("compiled", "disk")


class CompiledKernels(Collector):
    """``longreach_kernels_total{source}``: compiled now, or found compiled on disk; and the seconds that
    compiling took. Zeros where no kernel was ever asked for, as on a CPU."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        count = compiled()
        loaded = CounterMetricFamily("longreach_kernels", "GPU kernels loaded.", labels=["source"])
        for source, number in zip(SOURCES, (count.compiled, count.cached), strict=True):
            loaded.add_metric([source], number)
        yield loaded
        yield CounterMetricFamily(
            "longreach_kernel_compile_seconds", "Time that compiling GPU kernels took.", value=count.seconds
        )
