"""A launch and its kernel agree on which numbers change from call to call: no length compiles anew."""

from __future__ import annotations

import inspect

import pytest
import torch

from kernels._triton.registry import examples
from kernels._triton.targets import TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_kernels_do_not_specialise_on_what_launches_call_a_size_and_on_nothing_else(target: int) -> None:
    for launch in examples(TARGETS[target], torch.float16, 64):
        named = launch.fn.kwargs["do_not_specialize"] or ()
        parameters = list(inspect.signature(launch.fn.fn).parameters)
        assert all(isinstance(name, str) for name in named), launch.kernel
        assert set(named) == launch.sizes, launch.kernel
        assert launch.sizes <= set(parameters), launch.kernel
        assert list(launch.args) == parameters[: len(launch.args)], launch.kernel
        assert set(launch.constants) == set(parameters[len(launch.args) :]), launch.kernel
