"""Where the parts of a network lie that an attention layer's error is measured at: its output projection W_O,
and the part whose input is the residual stream.

Both are found once at load, by one forward over a single token that notes which module calls attention. The
residual stream is what the part that holds the attention module takes in: a whole layer in most networks,
the attention with its norm in BERT's kin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models.plan import ModelPlan, body_arguments
from models.seam import NAME

NAMES = ("o_proj", "out_proj", "dense", "Wo", "c_proj")
OUTPUT = "output"
"""The part beside an attention module that BERT and its kin keep its projection in."""


@dataclass(frozen=True)
class Place:
    """One attention layer's output projection, and the part that takes in the residual stream."""

    projection: nn.Module
    block: nn.Module | None

    @property
    def w_o(self) -> Tensor:
        """[E, H Dv]."""
        weight: Tensor = self.projection.get_parameter("weight").detach()
        return weight.t() if isinstance(self.projection, Conv1D) else weight


Places = Sequence[Place | str]
"""By number of the layer; a sentence where its projection is not known."""


class _Finder:
    """The forward keyword ``longreach`` of one forward: notes the modules, answers with zeros."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        self.modules.append(module)
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[-1])


@torch.inference_mode()
def find_places(body: Any, plan: ModelPlan) -> Places:
    """The place of every attention layer of the plan, in calling order."""
    finder = _Finder()
    token = torch.zeros(1, 1, dtype=torch.int64, device=body.device)
    body(
        input_ids=token,
        position_ids=token + plan.position_offset,
        **{NAME: finder},
        **body_arguments(body),
    )
    parents = {id(child): parent for parent in body.modules() for child in parent.children()}
    widths = [layer.num_heads * layer.shape.value_dim for layer in plan.layers]
    return [_place(module, parents, width) for module, width in zip(finder.modules, widths, strict=True)]


def _place(module: nn.Module, parents: dict[int, nn.Module], width: int) -> Place | str:
    block = parents.get(id(module))
    for part in (module, getattr(block, OUTPUT, None)):
        for name in NAMES:
            found = getattr(part, name, None)
            if isinstance(found, nn.Module) and _inputs(found) == width:
                return Place(found, block)
    told = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
    return (
        f"{type(module).__name__} has no output projection of {width} inputs named {' or '.join(NAMES)}; "
        f"it has {told or 'no parts'}"
    )


def _inputs(part: nn.Module) -> int | None:
    """Columns that a linear layer takes; None for anything else."""
    if isinstance(part, nn.Linear):
        return part.in_features
    return int(part.get_parameter("weight").shape[0]) if isinstance(part, Conv1D) else None
