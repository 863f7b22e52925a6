"""A counter-based generator: draw number t of stream s is a pure function of (s, t), in any order, on any
device.

    bits(s, t) = mix(s + (t + 1) * gamma)

with mix the 64-bit finaliser and gamma the increment of SplitMix64 (Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014). A stream is a seed with integers folded in one after another:
fold(s, n) = bits(s, n). Arithmetic is modulo 2^64 in int64 tensors; shifts are logical.
"""

from __future__ import annotations

from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def fold(stream: int, *counters: int) -> int:
    """The stream (a signed 64-bit integer) with non-negative integers folded in."""
    state = stream & _WORD
    for counter in counters:
        state = _mix_word(state + (counter + 1) * _GAMMA & _WORD)
    return _signed(state)


def bits(stream: Tensor, counter: Tensor) -> Tensor:
    """64 random bits for every (stream, counter), broadcast: int64 tensors in and out."""
    return _mix((counter + 1) * _signed(_GAMMA) + stream)


def below(random_bits: Tensor, bound: Tensor | int) -> Tensor:
    """Uniform integers in 0 .. bound - 1 (0 < bound < 2^31) from the upper half of the bits.

    Multiply and shift: no value's probability is off by more than 2^-32.
    """
    return (((random_bits >> 32) & 0xFFFFFFFF) * bound) >> 32


def _mix(x: Tensor) -> Tensor:
    """The finaliser; x is overwritten."""
    shifted = (x >> 30).bitwise_and_((1 << 34) - 1)
    x.bitwise_xor_(shifted).mul_(_signed(_FIRST))
    shifted = (x >> 27).bitwise_and_((1 << 37) - 1)
    x.bitwise_xor_(shifted).mul_(_signed(_SECOND))
    shifted = (x >> 31).bitwise_and_((1 << 33) - 1)
    return x.bitwise_xor_(shifted)


def _mix_word(x: int) -> int:
    x = (x ^ x >> 30) * _FIRST & _WORD
    x = (x ^ x >> 27) * _SECOND & _WORD
    return x ^ x >> 31


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
