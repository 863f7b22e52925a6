"""Runs every backend's impl ``triton`` on tensors of a device that is not there, and tells what it did.

The tensors have shapes, dtypes and a device named ``gpu``, and no numbers. So an operation that mixes devices
fails as it would on a GPU, and whatever the host asks of the device is seen: kernels are not launched but
counted, and a read is noted with the number of launches before it. A process of its own: the device's name is
registered for all of it.

    python -m tests.kernels.triton.fake_device        prints JSON: backend -> calls
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from kernels._triton import available, operands, targets
from kernels._triton.launch import Launch
from kernels.api import attend
from kernels.interpret_report import SMALL
from kernels.math.sbm import ClusterParams, random_clusters
from kernels.registry import BACKENDS, load

DEVICE = "gpu"
PLACES = [(True, 150, 150), (True, 33, 300), (True, 1, 300), (False, 160, 160)]
"""(causal, rows, keys)."""


@dataclass
class Told:
    """``launched`` kernels in order; ``reads``: (launches before it, where); ``elsewhere``: kernels with an
    argument on another device; ``error`` where the call failed."""

    where: str
    launched: list[str] = field(default_factory=list)
    reads: list[tuple[int, str]] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    error: str = ""


class Watching(TorchDispatchMode):
    """Numbers of the device are 0 and truths true, and noted; what touches the CPU alone is computed."""

    def __init__(self, told: Told, mode: FakeTensorMode) -> None:
        super().__init__()
        self.told, self.mode = told, mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        fake = [x for x in _tensors([args, named]) if isinstance(x, FakeTensor)]
        if func is torch.ops.aten._local_scalar_dense.default and fake:
            self.told.reads.append((len(self.told.launched), _place()))
            if args[0].dtype is torch.bool:  # as after a check that finds nothing wrong
                return True
            return 0.0 if args[0].is_floating_point() else 0
        if func is torch.ops.aten._to_copy.default and fake and str(named.get("device")) == "cpu":
            self.told.reads.append((len(self.told.launched), _place()))
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=named.get("dtype") or args[0].dtype)
        if not fake and str(named.get("device") or "cpu") == "cpu":
            with unset_fake_temporarily():
                return func(*args, **named)
        if not fake and args and isinstance(args[0], Tensor):  # a table on its way to the device
            args = (self.mode.from_tensor(args[0]), *args[1:])
        return func(*args, **named)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for each in value for x in _tensors(each)] if isinstance(value, list | tuple) else []


def _place() -> str:
    ours = [frame for frame in traceback.extract_stack() if "/kernels/" in frame.filename]
    ours = [frame for frame in ours if "/tests/" not in frame.filename]
    return f"{ours[-1].filename.rpartition('/kernels/')[2]}:{ours[-1].name}" if ours else "?"


def call(name: str, causal: bool, rows: int, keys: int) -> Told:
    told = Told(f"{'causal' if causal else 'bidirectional'} {rows} of {keys}")

    def run(launch: Launch) -> None:
        tensors = [x for x in launch.args.values() if isinstance(x, Tensor)]
        if any(x.device.type != DEVICE for x in tensors):
            told.elsewhere.append(launch.kernel)
        told.launched.append(launch.kernel)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for where, what, instead in _patches(run):
            stack.enter_context(patch.object(where, what, instead))
        for context in (mode, Watching(told, mode)):
            stack.enter_context(context)
        q, k, v = (
            torch.empty(1, heads, n, 24, device=DEVICE) for heads, n in ((2, rows), (1, keys), (1, keys))
        )
        try:
            learned = _learned(name)
            told.reads.clear()  # what a model carries is checked as it is loaded
            params = SMALL.get(name)
            attend(
                q, k, v, backend=name, params=params, causal=causal, scale=0.2, impl="triton", learned=learned
            )
        except Exception as error:  # whatever it is, it is told
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "/kernels/" in f.filename]
            at = f"{ours[-1].filename.rpartition('/kernels/')[2]}:{ours[-1].lineno}"
            told.error = f"{at}: {type(error).__name__}: {str(error)[:200]}"
    _forget()
    return told


def _patches(run: Callable[[Launch], None]) -> list[tuple[Any, str, Any]]:
    made = torch.tensor

    def on_device(data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        """As torch.tensor, which cannot make a tensor of numbers where there are none."""
        found: Tensor = made(data, dtype=dtype)
        return found if device is None else found.to(device)

    return [
        (available, "why_not_there", lambda *_: []),
        (Launch, "run", run),
        (operands, "_distance", lambda *_: 0),
        (operands, "_aligned", lambda *_: True),
        (targets, "_target_of", lambda *_: targets.TARGETS[90]),
        (torch, "tensor", on_device),
        (Tensor, "data_ptr", lambda _: 0),
    ]


def _learned(name: str) -> object | None:
    if not load(name).capabilities.learned:
        return None
    made = random_clusters(2, 24, 5, seed=7)
    return ClusterParams(*(x.to(DEVICE) for x in (made.clusters, made.w1, made.b1, made.w2, made.b2)))


def _forget() -> None:
    """What was drawn and planned on the device that is not there."""
    from kernels.math.cache import CACHES

    for kept in CACHES.values():
        kept.clear()


def main(names: Sequence[str]) -> None:
    _setup_privateuseone_for_python_backend(DEVICE)
    told = {
        name: [
            asdict(call(name, *place))
            for place in PLACES
            if getattr(load(name).capabilities, "causal" if place[0] else "bidirectional")
        ]
        for name in names
        if "triton" in load(name).impls
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:] or list(BACKENDS))
