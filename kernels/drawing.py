"""Pictures of the masks: queries down, keys across, a kept pair dark.

One pair is a whole number of pixels and lies exactly on them, so a picture can be read back as its mask.
Needs matplotlib (the extra ``bench``), of which only the Agg renderer: no display, no global state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.api import InvalidParams, parse_params
from kernels.conditions import directions, mask
from kernels.contract import Params
from kernels.math.graph import Pattern
from kernels.registry import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, LEFT_OUT, LATER = (27, 42, 73), (244, 241, 233), (222, 219, 212)
"""Colours of a pair that is kept, of one that is not, and of a later key, which no causal row may see."""

DPI = 100
MARGIN_LEFT, MARGIN_TOP, MARGIN_RIGHT, MARGIN_BOTTOM = 72, 84, 24, 56
"""Pixels around the mask in a picture of one."""
_SIDE = 512
_OVERVIEW_SIDE = 256
_OVERVIEW_BACKENDS_PER_ROW = 2
_OVERVIEW_TOP, _EDGE, _GAP, _ABOVE, _BELOW = 92, 32, 16, 52, 44


class MissingMatplotlib(ImportError):
    """Drawing was asked for and matplotlib is not installed."""

    def __init__(self) -> None:
        super().__init__("drawing needs matplotlib, which is not installed: pip install 'longreach[bench]'")


@dataclass(frozen=True)
class Drawing:
    """One backend's mask in one direction: ``kept`` bool [N, N], of the first layer's first head."""

    backend: str
    params: Params
    causal: bool
    kept: Pattern

    @property
    def direction(self) -> str:
        return "causal" if self.causal else "bidirectional"

    @property
    def density(self) -> float:
        N = len(self.kept)
        return float(self.kept.sum()) / (N * (N + 1) // 2 if self.causal else N * N)

    @property
    def told_params(self) -> str:
        given = self.params.model_dump(mode="json", exclude_none=True)
        return ", ".join(f"{name}={value}" for name, value in given.items()) or "no params"

    @property
    def origin(self) -> str:
        """What the picture is one example of, where it is."""
        able = load(self.backend).capabilities
        if able.selection != "none":
            return "chosen for one sample of normal queries and keys"
        return "one draw" if able.random else ""


def drawings(backend: str, params: Params | None, num_tokens: int) -> list[Drawing]:
    """One for each direction that the backend serves; None: params that show its structure at this length.

    Raises what ``kernels.conditions.mask`` raises.
    """
    shown = demonstration_params(backend, num_tokens) if params is None else params
    return [
        Drawing(backend, shown, causal, mask(backend, shown, num_tokens, causal, heads=1)[0].numpy())
        for causal in directions(backend, shown).values()
    ]


def demonstration_params(backend: str, num_tokens: int) -> Params:
    """The defaults with every whole number above N / 16 shrunk: to the first of N/16, N/8, N/4, ... below it
    that the backend accepts beside the others. A number for which it accepts none stays."""
    shown = parse_params(backend)
    while (smaller := _one_shrunk(backend, shown, num_tokens)) is not None:
        shown = smaller
    return shown


def _one_shrunk(backend: str, params: Params, num_tokens: int) -> Params | None:
    """With one number smaller, or None where none can be."""
    given = params.model_dump()
    for name, value in given.items():
        size = max(1, num_tokens // 16)
        while isinstance(value, int) and not isinstance(value, bool) and size < value:
            try:
                return parse_params(backend, {**given, name: size})
            except InvalidParams:
                size *= 2
    return None


def draw(drawing: Drawing) -> bytes:
    """A PNG of one mask with its axes. Raises MissingMatplotlib."""
    side = _side(len(drawing.kept), _SIDE)
    width, height = side + MARGIN_LEFT + MARGIN_RIGHT, side + MARGIN_TOP + MARGIN_BOTTOM
    figure = _figure(width, height)
    axes = _mask_axes(figure, drawing, MARGIN_LEFT, MARGIN_TOP, side)
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    heading = f"{drawing.backend}, {drawing.direction}: {drawing.density:.1%} of the pairs kept"
    _text(figure, MARGIN_LEFT, 14, heading, size=12, weight="bold")
    told = ", ".join(part for part in (drawing.told_params, drawing.origin) if part)
    _text(figure, MARGIN_LEFT, 38, textwrap.fill(told, width=side // 7), size=9)
    return _png(figure)


def overview(shown: Sequence[Sequence[Drawing]]) -> bytes:
    """A PNG of many masks, one entry per backend: its drawings side by side. Raises MissingMatplotlib."""
    num_tokens = len(shown[0][0].kept)
    side, columns = _side(num_tokens, _OVERVIEW_SIDE), _OVERVIEW_BACKENDS_PER_ROW
    pair, rows = 2 * side + _GAP, -(-len(shown) // columns)
    width, height = columns * (pair + _EDGE) + _EDGE, rows * (side + _ABOVE + _BELOW) + _OVERVIEW_TOP
    figure = _figure(width, height)
    _text(figure, _EDGE, 18, "Which keys each query attends to", size=13, weight="bold")
    legend = (
        f"{num_tokens} tokens; queries run down, keys across. Dark: kept. Grey: later keys, which no causal "
    )
    legend += "model reads. Params are small here, so that their structure shows."
    _text(figure, _EDGE, 44, textwrap.fill(legend, width=width // 6), size=9)
    for number, entry in enumerate(shown):
        left = _EDGE + number % columns * (pair + _EDGE)
        top = _OVERVIEW_TOP + number // columns * (side + _ABOVE + _BELOW)
        _text(figure, left, top, entry[0].backend, size=12, weight="bold")
        _text(figure, left, top + 20, textwrap.fill(entry[0].told_params, width=pair // 6), size=8.5)
        for drawing in entry:
            _overview_mask(figure, drawing, left + drawing.causal * (side + _GAP), top + _ABOVE, side)
    return _png(figure)


def _overview_mask(figure: Figure, drawing: Drawing, left: int, top: int, side: int) -> None:
    axes = _mask_axes(figure, drawing, left, top, side)
    axes.set_xticks([])
    axes.set_yticks([])
    _text(figure, left, top + side + 6, f"{drawing.direction}, {drawing.density:.1%} kept", size=9)


def _side(num_tokens: int, wanted: int) -> int:
    return num_tokens * max(1, wanted // num_tokens)


def _figure(width: int, height: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingMatplotlib from None
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")


def _mask_axes(figure: Figure, drawing: Drawing, left: int, top: int, side: int) -> Axes:
    """The mask in a square of ``side`` pixels whose upper left corner lies at (left, top)."""
    width, height = figure.get_size_inches() * DPI
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    axes.imshow(_colours(drawing), interpolation="nearest", aspect="auto")
    axes.spines[:].set(visible=False, position=("outward", 2))
    N = len(drawing.kept)
    places = sorted({0, N // 4, N // 2, 3 * N // 4, N - 1})
    axes.set_xticks(places)
    axes.set_yticks(places)
    return axes


def _colours(drawing: Drawing) -> Any:
    kept = drawing.kept
    picture = np.full((*kept.shape, 3), LEFT_OUT, dtype=np.uint8)
    if drawing.causal:
        picture[np.triu(np.ones_like(kept), 1)] = LATER
    picture[kept] = KEPT
    return picture


def _text(figure: Figure, left: int, top: int, text: str, *, size: float, weight: str = "normal") -> None:
    width, height = figure.get_size_inches() * DPI
    figure.text(
        left / width, 1 - top / height, text, fontsize=size, fontweight=weight, va="top", linespacing=1.25
    )


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()
