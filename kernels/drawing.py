"""Pictures of the masks: queries down, keys across, a kept pair dark.

One pair is a whole number of pixels and lies exactly on them, so a picture can be read back as its mask.
Needs matplotlib (the extra ``bench``), of which only the Agg renderer: no display, no global state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kernels.api import InvalidParams, parse_params
from kernels.conditions import directions, mask
from kernels.contract import Params
from kernels.math.graph import Pattern
from kernels.registry import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = NDArray[np.uint8]

KEPT, LEFT_OUT, LATER = (27, 42, 73), (244, 241, 233), (222, 219, 212)
"""Colours of a pair that is kept, of one that is not, and of a later key, which no causal row may see."""

DPI = 100
MARGIN_LEFT, MARGIN_TOP, MARGIN_RIGHT, MARGIN_BOTTOM = 72, 84, 24, 56
"""Pixels around the mask in a picture of one."""
_LENGTHS = (256, 512, 1024)
_NOT_SIZES = ("num_buckets", "num_clusters", "iterations")
"""Whole numbers that, made smaller, let rows see more or show nothing."""
_SIDE = 512
_OVERVIEW_SIDE = 256
_OVERVIEW_BACKENDS_PER_ROW = 2
_OVERVIEW_TOP, _EDGE, _GAP, _ABOVE, _BELOW = 92, 32, 16, 58, 44
_LETTER_WIDTH = 0.77
"""Of an average letter, in pixels per point of its size."""
_OVERVIEW_LEGEND = (
    "Queries run down, keys across. Dark: kept. Grey: later keys, which no causal model reads. "
    "Params are small here, so that their structure shows. Where a pixel stands for several pairs, its "
    "shade is the share of them that is kept."
)


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
    def terms(self) -> str:
        """Length and params, and what the mask is one example of, where it is."""
        given = self.params.model_dump(mode="json", exclude_none=True)
        told = [f"{len(self.kept)} tokens", *(f"{name}={value}" for name, value in given.items())]
        able = load(self.backend).capabilities
        if able.selection != "none":
            told.append("one sample of normal queries and keys")
        elif able.random:
            told.append("one draw")
        return ", ".join(told)


def drawings(backend: str, params: Params | None, num_tokens: int | None = None) -> list[Drawing]:
    """One for each direction that the backend serves.

    ``params`` None: small ones, at which its structure shows. ``num_tokens`` None: 256, or twice or four
    times that for a backend that would keep half of the pairs or more. Raises what
    ``kernels.conditions.mask`` raises.
    """
    shown: list[Drawing] = []
    for length in _LENGTHS if num_tokens is None else (num_tokens,):
        shown = _drawings(backend, params or demonstration_params(backend, length), length)
        if _shows_structure(shown):
            return shown
    while params is None and not _shows_structure(shown):
        smaller = _halved(backend, shown[0].params)
        if smaller == shown[0].params:
            break
        shown = _drawings(backend, smaller, len(shown[0].kept))
    return shown


def _shows_structure(shown: Sequence[Drawing]) -> bool:
    """Nothing would make the mask of ``exact`` show more."""
    return all(drawing.density < 0.5 or load(drawing.backend).capabilities.exact for drawing in shown)


def _drawings(backend: str, params: Params, num_tokens: int) -> list[Drawing]:
    return [
        Drawing(backend, params, causal, mask(backend, params, num_tokens, causal, heads=1)[0].numpy())
        for causal in directions(backend, params).values()
    ]


def demonstration_params(backend: str, num_tokens: int) -> Params:
    """The defaults with every size, a whole number, above N / 16 shrunk: to the smallest power of two, from a
    sixteenth of N and of itself on, that the backend accepts beside the others. One for which it accepts none
    stays."""
    shown = parse_params(backend)
    while (smaller := _one_shrunk(backend, shown, num_tokens)) is not None:
        shown = smaller
    return shown


def _one_shrunk(backend: str, params: Params, num_tokens: int) -> Params | None:
    """With one number smaller, or None where none can be."""
    defaults = _sizes(parse_params(backend))
    for name, value in _sizes(params).items():
        size = 1 << max(1, num_tokens // 16, defaults[name] // 16).bit_length() - 1
        while size < value:
            if (smaller := _accepted(backend, params, name, size)) is not None:
                return smaller
            size *= 2
    return None


def _halved(backend: str, params: Params) -> Params:
    """With every whole number halved for which the backend accepts that."""
    for name, value in _sizes(params).items():
        smaller = _accepted(backend, params, name, value // 2) if value > 1 else None
        params = smaller or params
    return params


def _sizes(params: Params) -> dict[str, int]:
    given = params.model_dump()
    return {name: value for name, value in given.items() if type(value) is int and name not in _NOT_SIZES}


def _accepted(backend: str, params: Params, name: str, value: int) -> Params | None:
    try:
        return parse_params(backend, {**params.model_dump(), name: value})
    except InvalidParams:
        return None


def draw(drawing: Drawing) -> bytes:
    """A PNG of one mask with its axes. Raises MissingMatplotlib."""
    N = len(drawing.kept)
    side = N * max(1, _SIDE // N)
    width, height = side + MARGIN_LEFT + MARGIN_RIGHT, side + MARGIN_TOP + MARGIN_BOTTOM
    figure = _figure(width, height)
    axes = _picture(figure, _colours(drawing), MARGIN_LEFT, MARGIN_TOP, side)
    places = sorted({0, N // 4, N // 2, 3 * N // 4, N - 1})
    axes.set(xlabel="key position", ylabel="query position", xticks=places, yticks=places)
    heading = f"{drawing.backend}, {drawing.direction}: {drawing.density:.1%} of the pairs kept"
    _text(figure, MARGIN_LEFT, 28, heading, size=12, weight="bold")
    _lines(figure, MARGIN_LEFT, 48, drawing.terms, side, size=9)
    return _png(figure)


def overview(shown: Sequence[Sequence[Drawing]]) -> bytes:
    """A PNG of many masks, one entry per backend: its drawings side by side. Raises MissingMatplotlib.

    Masks of 512 tokens and more are shrunk by whole factors; a shade is a share of pairs there.
    """
    pictures = [[_about(_colours(drawing), _OVERVIEW_SIDE) for drawing in entry] for entry in shown]
    side = max(len(picture) for entry in pictures for picture in entry)
    columns, pair, row = _OVERVIEW_BACKENDS_PER_ROW, 2 * side + _GAP, side + _ABOVE + _BELOW
    width, height = columns * (pair + _EDGE) + _EDGE, -(-len(shown) // columns) * row + _OVERVIEW_TOP
    figure = _figure(width, height)
    _text(figure, _EDGE, 32, "Which keys each query attends to", size=13, weight="bold")
    _lines(figure, _EDGE, 54, _OVERVIEW_LEGEND, width - 2 * _EDGE, size=9)
    for number, (entry, masks) in enumerate(zip(shown, pictures, strict=True)):
        left, top = _EDGE + number % columns * (pair + _EDGE), _OVERVIEW_TOP + number // columns * row
        _text(figure, left, top + 12, entry[0].backend, size=12, weight="bold")
        _lines(figure, left, top + 29, entry[0].terms, pair, size=8.5)
        for drawing, picture in zip(entry, masks, strict=True):
            at = left + drawing.causal * (side + _GAP)
            _picture(figure, picture, at, top + _ABOVE, len(picture))
            caption = f"{drawing.direction}, {drawing.density:.1%} kept"
            _text(figure, at, top + _ABOVE + side + 16, caption, size=9)
        if len(entry) == 1:
            other = "bidirectional" if entry[0].causal else "causal"
            at = left + (not entry[0].causal) * (side + _GAP)
            _text(figure, at, top + _ABOVE + side + 16, f"{other}: not served", size=9)
    return _png(figure)


def _about(picture: Picture, side: int) -> Picture:
    """Enlarged or shrunk by a whole factor, to between half of ``side`` and twice as much."""
    if len(picture) <= side:
        return picture.repeat(side // len(picture), axis=0).repeat(side // len(picture), axis=1)
    factor = len(picture) // side
    fill = -len(picture) % factor
    padded = np.pad(picture, ((0, fill), (0, fill), (0, 0)), mode="edge")
    size = len(padded) // factor
    shrunk: Picture = padded.reshape(size, factor, size, factor, 3).mean((1, 3)).round().astype(np.uint8)
    return shrunk


def _figure(width: int, height: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingMatplotlib from None
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")


def _picture(figure: Figure, picture: Picture, left: int, top: int, side: int) -> Axes:
    """Drawn into the square of ``side`` pixels whose upper left corner lies at (left, top)."""
    width, height = figure.get_size_inches() * DPI
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.spines[:].set(visible=False, position=("outward", 2))
    axes.set(xticks=[], yticks=[])
    return axes


def _colours(drawing: Drawing) -> Picture:
    """[N, N, 3], one pixel per pair."""
    kept = drawing.kept
    picture = np.full((*kept.shape, 3), LEFT_OUT, dtype=np.uint8)
    if drawing.causal:
        picture[np.triu(np.ones_like(kept), 1)] = LATER
    picture[kept] = KEPT
    return picture


def _text(figure: Figure, left: int, base: int, text: str, *, size: float, weight: str = "normal") -> None:
    """Beginning at pixel ``left``, its first line standing ``base`` pixels below the upper edge."""
    width, height = figure.get_size_inches() * DPI
    at = (left / width, 1 - base / height)
    figure.text(*at, text, fontsize=size, fontweight=weight, va="baseline")


def _lines(figure: Figure, left: int, base: int, text: str, width: int, *, size: float) -> None:
    """Wrapped to about ``width`` pixels."""
    letters = max(24, int(width / size / _LETTER_WIDTH))
    for number, line in enumerate(textwrap.wrap(text, letters)):
        _text(figure, left, base + number * round(size * 1.5), line, size=size)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()
