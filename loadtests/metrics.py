"""The server's own numbers, read from ``/metrics``."""

from __future__ import annotations

import re
from urllib.request import Request, urlopen

from loadtests.server import ServerProblem

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def read_metrics(host: str, api_key: str = "") -> Samples:
    """ServerProblem where they cannot be read."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urlopen(Request(host + "/metrics", headers=headers), timeout=60) as response:
            return parse(response.read().decode())
    except OSError as error:
        raise ServerProblem(f"no metrics at {host}/metrics: {error}") from error


def parse(text: str) -> Samples:
    """Samples of the plain text format by name and labels."""
    found: Samples = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            name, labels, value = match.groups()
            found[name, frozenset(_LABEL.findall(labels or ""))] = float(value)
    return found


def sum_of(samples: Samples, name: str, **labels: str) -> float | None:
    """The sum of the series that carry these labels among theirs; None where there are none."""
    wanted = set(labels.items())
    values = [value for (each, own), value in samples.items() if each == name and wanted <= own]
    return sum(values) if values else None
