"""A transformers network made ready for packed steps: its body, head, plan and sizes in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.head import Head
from models.memory import Sizes, mlp_blocks
from models.places import Places, find_places
from models.plan import ModelPlan, body_arguments, make_plan
from models.products import make_leavable
from models.seam import Learned


@dataclass(frozen=True)
class Network:
    """What a step needs to know of a network."""

    body: Any
    head: Head | None
    plan: ModelPlan
    sizes: Sizes
    arguments: dict[str, Any]
    """Fixed keywords of every forward."""
    vocab_size: int
    """Rows of the embedding: token ids are 0 .. vocab_size - 1."""
    linear_params: float
    """Weights that every token is multiplied with; embeddings and head left out."""
    head_params: int
    places: Places
    """Where the error of each attention layer is measured."""
    learned: Learned = field(default_factory=dict)
    """What the model carries for backends that need parameters of their own."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.body.device)

    def at_offset(self, position_offset: int) -> Network:
        """The same network with positions that begin at ``position_offset``."""
        return replace(self, plan=replace(self.plan, position_offset=position_offset))


def build_network(network: Any, max_tokens: int, position_offset: int = 0) -> Network:
    """Probe a transformers network (attention set to the seam) and measure it. ModelError where it is
    refused."""
    output = network.get_output_embeddings()
    body = network if output is None else network.base_model
    vocab_size = int(network.get_input_embeddings().num_embeddings)

    def ordinary(n: int) -> Tensor:
        return (torch.arange(n, device=body.device) % vocab_size)[None]

    plan = replace(make_plan(body, max_tokens, ordinary), position_offset=position_offset)
    logits_size = 0 if output is None else int(output.weight.shape[0])
    make_leavable(body)
    return Network(
        body=body,
        head=None if output is None else Head(network),
        plan=plan,
        sizes=_sizes(body, plan, logits_size),
        arguments=body_arguments(body),
        vocab_size=vocab_size,
        linear_params=_linear_params(body),
        head_params=0 if output is None else int(output.weight.numel()),
        places=find_places(body, plan),
    )


def _sizes(body: Any, plan: ModelPlan, logits_size: int) -> Sizes:
    hidden = int(body.config.hidden_size)
    on_cpu, widest = torch.device(body.device).type == "cpu", _widest_output(body, hidden)
    return Sizes(plan, hidden, widest, logits_size, body.dtype.itemsize, on_cpu, mlp_blocks(body, widest))


def _widest_output(body: nn.Module, hidden: int) -> int:
    """Columns of the widest linear layer: the MLP's intermediate size, however the network calls it."""
    widths = [m.out_features for m in body.modules() if isinstance(m, nn.Linear)]
    return max([hidden, *widths])


def _linear_params(body: Any) -> float:
    """Weights of matrices outside embeddings; of a mixture of experts the share that one token meets."""
    embeddings = {id(p) for m in body.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    config = body.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    met = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    total = 0.0
    for parameter in body.parameters():
        if id(parameter) not in embeddings and parameter.ndim >= 2:
            total += parameter.numel() * (met if parameter.ndim == 3 else 1.0)
    return total
