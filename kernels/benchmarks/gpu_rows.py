"""What the GPU bench found: rows, their JSON file, table and plot."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class GpuRow:
    """One backend at one shape, dtype, length and direction. Times are medians in ms, selection included;
    ``tflops`` counts 4 D FLOP per score element computed; ``difference`` is the largest from impl torch in
    fp32, None at long lengths."""

    backend: str
    shape: str
    dtype: str
    length: int
    causal: bool
    ms: float
    opponents_ms: dict[str, float]
    flex_ms: float | None
    flex_reason: str
    density: float
    density_computed: float
    tflops: float
    peak_bytes: int | None
    difference: float | None

    def speedup(self, opponent: str) -> float | None:
        return self.opponents_ms[opponent] / self.ms if opponent in self.opponents_ms else None

    def line(self) -> str:
        direction = "causal" if self.causal else "bidirectional"
        ratios = [f"{ms / self.ms:.2f}x {name}" for name, ms in self.opponents_ms.items()]
        if self.flex_ms is not None:
            ratios.append(f"{self.flex_ms / self.ms:.2f}x FlexAttention")
        return (
            f"{self.backend:15} {self.shape:10} {self.dtype} N={self.length:<7} {direction:13} "
            f"{self.ms:9.3f} ms  {self.tflops:6.1f} TFLOP/s  {', '.join(ratios)}"
        )


@dataclass(frozen=True)
class Device:
    date: str
    command: str
    name: str
    capability: int
    torch: str
    triton: str
    cuda: str | None
    python: str


def device_of(arguments: Sequence[str]) -> Device:
    """The current CUDA device; the CPU's name where there is none (the kernels are then interpreted)."""
    cuda = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if cuda else (0, 0)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return Device(
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        shlex.join(["python", "-m", "kernels.bench_gpu", *arguments]),
        torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        10 * major + minor,
        torch.__version__,
        triton,
        torch.version.cuda,
        platform.python_version(),
    )


@dataclass
class GpuRecord:
    """Filled while the bench runs. ``failures``: cases that raised, with what they said."""

    device: Device
    rows: list[GpuRow] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    complete: bool = False

    def head(self) -> str:
        d = self.device
        return f"`{d.command}`, {d.date}\n{d.name} (sm_{d.capability}), torch {d.torch}, triton {d.triton}\n"

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        told = {
            **asdict(self.device),
            "complete": self.complete,
            "rows": [asdict(row) for row in self.rows],
            "failures": self.failures,
        }
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def table(rows: Sequence[GpuRow]) -> str:
    """Markdown: one row each, times of the opponents over ours."""
    opponents = list(dict.fromkeys(name for row in rows for name in row.opponents_ms))
    head = ["backend", "shape", "dtype", "N", "direction", "ms", "TFLOP/s", "density"]
    head += [f"{name} over ours" for name in opponents] + ["FlexAttention over ours", "peak MB", "difference"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 3 + "--:|---|" + "--:|" * (len(head) - 5)]
    lines += ["| " + " | ".join(_cells(row, opponents)) + " |" for row in rows]
    return "\n".join(lines)


def _cells(row: GpuRow, opponents: Sequence[str]) -> list[str]:
    cells = [f"`{row.backend}`", row.shape, row.dtype, f"{row.length:,}"]
    cells += ["causal" if row.causal else "bidirectional", f"{row.ms:.3f}", f"{row.tflops:.0f}"]
    cells.append(f"{row.density:.4f}")
    cells += [_ratio(row.speedup(name)) for name in opponents]
    cells.append(_ratio(None if row.flex_ms is None else row.flex_ms / row.ms))
    cells.append("–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}")
    cells.append("–" if row.difference is None else f"{row.difference:.1e}")
    return cells


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def plot(record: GpuRecord, path: Path) -> None:
    """Time over length, one panel per shape, dtype and direction, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.shape, row.dtype, row.causal) for row in record.rows))
    figure = Figure(figsize=(5.2 * max(len(panels), 1) + 2, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(row.backend for row in record.rows))
    for axis, (shape, dtype, causal) in zip(axes, panels, strict=False):
        shown = [row for row in record.rows if (row.shape, row.dtype, row.causal) == (shape, dtype, causal)]
        _panel(axis, shown, names)
        axis.set_title(f"{shape} {dtype}, {'causal' if causal else 'bidirectional'}", fontsize=11)
        axis.set_xlabel("N, tokens")
    axes[0].set_ylabel("time of one call, ms")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(f"{record.device.name}, torch {record.device.torch}, triton {record.device.triton}")
    figure.savefig(path, dpi=120)


def _panel(axis: object, rows: Sequence[GpuRow], names: Sequence[str]) -> None:
    """SDPA black, each backend's line in a colour and dash of its own."""
    draw = axis.loglog  # type: ignore[attr-defined]
    dense = {row.length: row.opponents_ms["SDPA"] for row in rows if "SDPA" in row.opponents_ms}
    draw(list(dense), list(dense.values()), color="black", linewidth=2, label="SDPA")
    for place, name in enumerate(names):
        own = [(row.length, row.ms) for row in rows if row.backend == name]
        if own:
            dash = ("-", "--", ":")[place // 10 % 3]
            draw(*zip(*own, strict=True), color=f"C{place % 10}", linestyle=dash, marker="o", label=name)
