"""Where the memory of tensors comes from on a CPU: small ones from the C library's heap, large ones from the
system, to which they go back when they are freed.

glibc raises the border between the two to 32 MiB, block by block, as large ones are freed. What comes from
the heap leaves holes: torch asks for aligned blocks, each of which needs a hole a little larger than what the
last one of its size left. A step over a whole document then takes 1.3 to 2.4 times what lives in it, another
share every time. A fixed border makes the peak predictable, and costs the clearing of the pages of what lies
between the two borders.
"""

from __future__ import annotations

import ctypes
import sys

GLIBC_LARGEST_HEAP_BLOCK = 32 << 20
LARGEST_HEAP_BLOCK = 4 << 20
"""The blocks of a decoder's chunks of 512 tokens stay below it up to a width of 2,048."""
KEPT_FREE_BYTES = 64 << 20
"""Free memory at the heap's end that is not given back at once."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_border = GLIBC_LARGEST_HEAP_BLOCK


def largest_heap_block() -> int:
    """Bytes from which on a block comes straight from the system."""
    return _border


def fix_border(largest_block: int = LARGEST_HEAP_BLOCK) -> bool:
    """Take larger blocks from the system, from now on and for the whole process. False where the C library
    has no such setting: nothing has changed then."""
    global _border
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, largest_block):
        return False
    mallopt(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES)
    _border = largest_block
    return True
