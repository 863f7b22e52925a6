"""What a profile belongs to: weights and configuration, device, threads, torch."""

from __future__ import annotations

import argparse
import hashlib
import json

import torch
from torch import Tensor

from models.network import Network
from models.profile import Stamp
from models.quality_options import context_of
from models.runner import Model

SAMPLED = 64
"""Elements of each weight that the fingerprint reads: a minute's hashing of a large model would not tell
trained weights apart any better."""


def stamp_of(model: Model) -> Stamp:
    info, here = model.info, context_of(argparse.Namespace(command=""))
    on_gpu = info.device.startswith("cuda")
    return Stamp(
        model=info.name,
        fingerprint=fingerprint(model._network),
        dtype=info.dtype,
        device=info.device,
        processor=torch.cuda.get_device_name(info.device) if on_gpu else here["processor"],
        threads=here["threads"],
        torch=here["torch"],
    )


@torch.inference_mode()
def fingerprint(network: Network) -> str:
    """sha256 over the configuration and over name, shape, type and ``SAMPLED`` evenly spaced elements of
    every weight."""
    digest = hashlib.sha256(_configuration(network).encode())
    for name, weight in sorted(network.body.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_sampled(weight))
    return digest.hexdigest()


def _configuration(network: Network) -> str:
    raw = network.body.config.to_dict()
    return json.dumps(
        {name: raw[name] for name in raw if name not in _NOT_THE_MODEL}, sort_keys=True, default=str
    )


_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


def _sampled(weight: Tensor) -> bytes:
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLED, flat.numel()), dtype=torch.float64)
    return flat[places.long().to(flat.device)].double().cpu().numpy().tobytes()
