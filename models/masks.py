"""Which keys a layer may see, read off the mask it asks transformers for, without building the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from models.contract import ModelError
from models.seam import MaskRequest, window_params


def read_mask(request: MaskRequest, name: str, max_tokens: int) -> tuple[bool, int | None]:
    """(causal, window as the ``window`` backend counts it or None) of what transformers would have masked.

    The predicate is evaluated at pairs around every boundary that a window could have and compared with the
    four shapes that the kernels serve. A window that covers the model's whole context is none.
    """
    if request.padding is not None:
        raise ModelError(f"{name} asks for a padding mask; a packed stream has no padding")
    queries, keys = _pairs(request.window)
    try:
        zero = torch.zeros((), dtype=torch.long)
        wanted = torch.as_tensor(request.allowed(zero, zero, queries, keys)).expand(queries.shape)
    except Exception as error:
        raise ModelError(f"{name} has a mask that depends on more than positions: {error}") from error
    for (causal, window), allowed in _shapes(request.window, queries, keys):
        if torch.equal(wanted, allowed):
            return causal, _checked(window, name, max_tokens)
    raise ModelError(
        f"{name} has a mask that is neither causal nor bidirectional, with or without a sliding window "
        "(prefix, chunked or block masks are not served)"
    )


def _pairs(window: int | None) -> tuple[Tensor, Tensor]:
    w = window or 8
    offsets = sorted({base + d for base in (0, w, -w, 2 * w, -2 * w) for d in (-2, -1, 0, 1, 2)})
    rows = sorted({0, 1, 2, 7, w - 1, w, w + 1, 2 * w, 3 * w + 1, 5 * w})
    pairs = [(i, i + d) for i in rows if i >= 0 for d in offsets if i + d >= 0]
    queries, keys = zip(*pairs, strict=True)
    return torch.tensor(queries), torch.tensor(keys)


def _shapes(
    window: int | None, queries: Tensor, keys: Tensor
) -> list[tuple[tuple[bool, int | None], Tensor]]:
    causal, distance = keys <= queries, (queries - keys).abs()
    shapes: list[tuple[tuple[bool, int | None], Tensor]] = [
        ((True, None), causal),
        ((False, None), torch.ones_like(causal)),
    ]
    if window is not None:
        shapes += [
            ((True, window), causal & (distance < window)),
            ((False, window), distance <= window),
            ((False, window - 1), distance < window),
        ]
    return shapes


def _checked(window: int | None, name: str, max_tokens: int) -> int | None:
    if window is None or window >= max_tokens:
        return None
    try:
        window_params(window)
    except ValueError as error:
        raise ModelError(
            f"{name} has a sliding window of {window} that `window` cannot express: {error}"
        ) from error
    return window
