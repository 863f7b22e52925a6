"""The language-model head alone: hidden states in, logits out, by the network's own forward.

Heads differ (scaled, soft-capped, biased logits). Instead of imitating them, the network's forward is run
with its body replaced by one that hands back given hidden states. Weights are shared, nothing is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from models.contract import ModelError

ROWS_AT_ONCE = 256  # rows of [rows, V] logits that exist at a time: 156 MB at V = 152k in fp32


class _Output(BaseModelOutputWithPast):  # type: ignore[misc]  # transformers carries no types
    """What a body returns; anything a network also looks for there (router logits, cross attentions) is
    None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Given(nn.Module):
    """A body that is already done: returns the hidden states it was given as embeddings.

    Some networks call a part of their body (``self.model.decoder``): its parts are the same stand-in.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.config = body.config
        self._parts = frozenset(body._modules)

    def __getattr__(self, name: str) -> Any:
        if name != "_parts" and name in self._parts:
            return self
        return super().__getattr__(name)

    def forward(self, *_args: Any, inputs_embeds: Tensor, **_kwargs: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


class Head:
    """``head(hidden [n, E])`` -> logits [n, V] in fp32."""

    def __init__(self, network: Any) -> None:
        body_name = network.base_model_prefix
        if body_name not in network._modules:
            raise ModelError(
                f"{type(network).__name__} has no body named {body_name!r}: its head cannot be run alone"
            )
        self._network = copy.copy(network)
        self._network._modules = {**network._modules, body_name: _Given(network.base_model)}

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._network(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0].float()

    def scores(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Natural-log likelihood [n] fp32 of ``targets`` [n] int64 given ``hidden`` [n, E], some rows at a
        time."""
        parts = [self._log_likelihood(h, t) for h, t in _chunks(hidden, targets)]
        return torch.cat(parts)

    def _log_likelihood(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self(hidden)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _chunks(hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(torch.split(hidden, ROWS_AT_ONCE), torch.split(targets, ROWS_AT_ONCE), strict=True)
