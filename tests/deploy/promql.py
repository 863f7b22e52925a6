"""The metrics, labels and label values that PromQL expressions name, and those that the service exports."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from kernels.registry import BACKENDS
from models.contract import ModelInfo
from service.metrics import Metrics

SELECTOR = re.compile(r"\b((?:longreach|process)_[a-zA-Z0-9_]+)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
SCRAPED = {"job", "instance"}  # labels that Prometheus adds


@dataclass(frozen=True)
class Matcher:
    metric: str
    label: str
    operator: str
    value: str


def metrics_in(expr: str) -> set[str]:
    return {match[1] for match in SELECTOR.finditer(expr)}


def matchers_in(expr: str) -> Iterator[Matcher]:
    for selector in SELECTOR.finditer(expr):
        for match in MATCHER.finditer(selector[2] or ""):
            yield Matcher(selector[1], match[1], match[2], match[3])


def groupings_in(expr: str) -> set[str]:
    return {label.strip() for match in GROUPING.finditer(expr) for label in match[1].split(",")}


def exported_series() -> dict[str, dict[str, set[str]]]:
    """Series name -> label -> values, of a server with one model that can do everything."""
    metrics = Metrics()
    info = ModelInfo(
        name="m",
        source="s",
        revision=None,
        architecture="llama",
        tasks=("encode", "generate", "score"),
        max_tokens=1 << 20,
        dtype="float32",
        device="cpu",
        causal=True,
        num_layers=1,
        applied_layers=(0,),
        local_layers={},
        embedding_dim=8,
        num_parameters=1,
    )
    metrics.add_model(info, BACKENDS)
    for by_device in (metrics.memory_reserved, metrics.memory_limit):
        by_device.labels("cpu")
    series: dict[str, dict[str, set[str]]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels = series.setdefault(sample.name, defaultdict(set))
            for label, value in sample.labels.items():
                labels[label].add(value)
    return series
