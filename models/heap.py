"""Where the memory of tensors comes from on a CPU: small ones from the C library's heap, large ones from the
system, to which they go back when they are freed.

glibc raises the border between the two to 32 MiB, block by block, as large ones are freed. What comes from
the heap leaves holes: torch asks for aligned blocks, each of which needs a hole a little larger than what the
last one of its size left. A step over a whole document then takes 1.3 to 2.4 times what lives in it, another
share every time. With a lower border its peak is predictable, and what lies between the borders is cleared
page by page whenever it is taken: a quarter of the time of 2,000 tokens, nothing that shows from 4,000 on.
So the border follows the step: low for long documents, glibc's own for everything else.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

HIGH_BORDER = 32 << 20
LOW_BORDER = 4 << 20
LONG_DOCUMENT_BYTES = 8 << 20
"""Hidden states of a step from which on it runs under the low border: 2,730 tokens of 768 fp32 numbers."""
KEPT_FREE_BYTES = 64 << 20
"""Free memory at the heap's end that is not given back at once."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_border: int | None = None


def border_for(hidden_bytes: int) -> int:
    """Bytes from which on a block comes straight from the system, in a step whose hidden states take
    ``hidden_bytes``."""
    return LOW_BORDER if hidden_bytes >= LONG_DOCUMENT_BYTES and _mallopt() is not None else HIGH_BORDER


def set_border(largest_block: int) -> None:
    """Take larger blocks from the system, from now on and for the whole process. Nothing where the C library
    has no such setting."""
    global _border
    mallopt = _mallopt()
    if mallopt is None or largest_block == _border:
        return
    mallopt(_M_MMAP_THRESHOLD, largest_block)
    mallopt(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES)
    _border = largest_block


@cache
def _mallopt() -> ctypes._NamedFuncPointer | None:
    """glibc's, and nobody else's: what its numbers mean elsewhere is not known."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc.mallopt if hasattr(libc, "gnu_get_libc_version") else None
