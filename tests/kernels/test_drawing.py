"""Pictures of masks: read back pixel by pixel."""

from __future__ import annotations

import sys
from io import BytesIO
from typing import Any

import numpy as np
import pytest

from kernels import drawing
from kernels.api import backend_names, parse_params
from kernels.conditions import directions, mask, why_no_mask
from kernels.drawing import Drawing, demonstration_params, draw, drawings, overview
from kernels.registry import load

pytest.importorskip("matplotlib", reason="drawing needs the extra `bench`")

MASKED = [name for name in backend_names() if why_no_mask(name) is None]
SELECTIONS = {name: load(name).capabilities.selection for name in MASKED}


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    from matplotlib.image import imread

    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return np.round(imread(BytesIO(png), format="png")[..., :3] * 255).astype(int)


def read_back(png: bytes, num_tokens: int, side: int = 512) -> np.ndarray[Any, Any]:
    """The colours of all pairs [N, N, 3]; every pixel of a pair has the same."""
    size = side // num_tokens
    top, left = drawing.MARGIN_TOP, drawing.MARGIN_LEFT
    square = pixels(png)[top : top + num_tokens * size, left : left + num_tokens * size]
    cells = square.reshape(num_tokens, size, num_tokens, size, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    return cells[:, 0, :, 0]


@pytest.mark.parametrize("name", MASKED)
def test_dark_pixels_are_the_pairs_of_the_mask(name: str) -> None:
    shown = drawings(name, None, 128)
    assert [each.direction for each in shown] == list(directions(name, load(name).params()))
    for each in shown:
        colours = read_back(draw(each), 128)
        kept = mask(name, each.params, 128, each.causal, heads=1)[0].numpy()
        assert kept.any() and np.array_equal((colours == drawing.KEPT).all(-1), kept)
        later = np.triu(np.ones_like(kept), 1) & each.causal
        assert np.array_equal((colours == drawing.LATER).all(-1), later)
        assert np.array_equal((colours == drawing.LEFT_OUT).all(-1), ~kept & ~later)


@pytest.mark.parametrize("num_tokens", [1, 3, 100, 256, 600])
def test_a_picture_of_any_length_is_whole_pixels_per_pair(num_tokens: int) -> None:
    each = drawings("window", parse_params("window", {"window": 9}), num_tokens)[0]
    side = num_tokens * max(1, 512 // num_tokens)
    colours = read_back(draw(each), num_tokens, side)
    assert np.array_equal((colours == drawing.KEPT).all(-1), each.kept)


def test_the_overview_shows_every_mask_it_is_given() -> None:
    shown = [drawings(name, None, 64) for name in ("window", "strided", "random")]
    dark = (pixels(overview(shown)) == drawing.KEPT).all(-1).sum()
    cell = (256 // 64) ** 2
    assert dark == cell * sum(int(each.kept.sum()) for entry in shown for each in entry)


@pytest.mark.parametrize("name", [name for name, selection in SELECTIONS.items() if selection == "none"])
def test_demonstration_params_show_structure_where_the_defaults_would_fill_the_picture(name: str) -> None:
    shown = demonstration_params(name, 256)
    default = load(name).params()
    for field, value in shown.model_dump().items():
        assert value == getattr(default, field) or value < getattr(default, field)
    for each in drawings(name, None):
        assert len(each.kept) == 256
        assert (each.density < 0.5) == (name != "exact")


def test_a_long_mask_is_shrunk_in_the_overview_and_its_shade_is_a_share() -> None:
    checkered = np.kron(np.ones((256, 256), dtype=bool), np.array([[1, 0], [0, 0]], dtype=bool))
    checkered |= np.eye(512, dtype=bool)
    long = Drawing("window", load("window").params(), False, checkered)
    short = Drawing("window", load("window").params(), False, checkered[:256, :256])
    picture = pixels(overview([[long]]))
    assert picture.shape == pixels(overview([[short]])).shape
    quarter, half = (
        np.round(share * np.array(drawing.KEPT) + (1 - share) * np.array(drawing.LEFT_OUT))
        for share in (0.25, 0.5)
    )
    assert (abs(picture - quarter) <= 1).all(-1).sum() == 256 * 255
    assert (abs(picture - half) <= 1).all(-1).sum() >= 256


@pytest.mark.parametrize("name", [name for name, selection in SELECTIONS.items() if selection != "none"])
def test_a_mask_that_fills_its_picture_is_drawn_longer_or_with_smaller_params(name: str) -> None:
    for each in drawings(name, None):
        assert (len(each.kept) > 256) == (SELECTIONS[name] == "tile") and each.density < 0.5
        assert each.params == parse_params(name, each.params.model_dump())


def test_demonstration_params_are_as_small_as_the_backend_allows() -> None:
    assert demonstration_params("window", 256).model_dump() == {"window": 32, "global_tokens": 0}
    assert demonstration_params("bigbird", 256).model_dump() == {
        "window": 16,
        "global_tokens": 16,
        "num_random": 32,
        "block_size": 32,
    }
    assert demonstration_params("star", 256) == load("star").params()
    assert demonstration_params("window", 1 << 14) == load("window").params()


def test_density_in_a_title_is_that_of_the_picture() -> None:
    kept = np.tri(4, dtype=bool)
    kept[3, 0] = False
    assert Drawing("window", load("window").params(), True, kept).density == 0.9
    assert Drawing("window", load("window").params(), False, kept).density == 9 / 16


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    each = drawings("star", None, 16)[0]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(drawing.MissingMatplotlib, match=r"pip install 'longreach\[bench\]'"):
        draw(each)
