"""Parameters that a model carries for backends which need their own, read from a file beside its weights.

``sbm.safetensors`` holds for every attention layer to which a choice applies, counted from n = 0:

    layers.n.clusters [H, C, D]              H query heads, C clusters, D head_dim
    layers.n.w1 [D, D], layers.n.b1 [D], layers.n.w2 [D, D], layers.n.b2 [D]
    layers.n.affinity [H, C, C]              may be left out, layer by layer

C may differ from layer to layer. What the numbers mean is told in ``kernels.math.sbm``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kernels.math.sbm import ClusterParams
from models.contract import ModelError
from models.plan import ModelPlan
from models.seam import LayerPlan, Learned

FILES = {"sbm": "sbm.safetensors"}
"""Backend -> the file, in a model's directory, that carries its parameters."""
_SHAPES = {"clusters": "HCD", "w1": "DD", "b1": "D", "w2": "DD", "b2": "D", "affinity": "HCC"}
_OPTIONAL = frozenset({"affinity"})
_LETTERS = {"H": "query heads", "C": "clusters", "D": "head_dim"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_NAMES = 5


def missing(backend: str, model: str) -> str:
    """Why ``model`` cannot run ``backend``, and how a model comes to carry what it lacks."""
    told = f"backend {backend!r} needs parameters of its own, which {model!r} does not carry"
    if backend not in FILES:
        return told
    return (
        f"{told}: they belong in {FILES[backend]} beside its weights, as {_told_names(0)} of the first "
        "layer to which a choice applies, and so on for every other"
    )


def read_learned(directory: Path, plan: ModelPlan, dtype: torch.dtype, device: str) -> Learned:
    """What the directory carries, in the weights' dtype and on their device; {} where it carries nothing.
    ModelError naming the tensor, the shape it should have, and the way out."""
    path = directory / FILES["sbm"]
    if not path.is_file():
        return {}
    layers = [plan.layers[index] for index in plan.applied_layers]
    tensors = _read(path)
    _refuse_names(path, set(tensors), len(layers))
    found = [
        {name: tensors[f"layers.{n}.{name}"] for name in _SHAPES if f"layers.{n}.{name}" in tensors}
        for n in range(len(layers))
    ]
    pairs = enumerate(zip(layers, found, strict=True))
    return {"sbm": [_cluster_params(path, f"layers.{n}", *pair, dtype, device) for n, pair in pairs]}


def num_parameters(learned: Learned) -> int:
    """Numbers that are held for all backends together."""
    layers = [layer for of_layers in learned.values() for layer in of_layers]
    values = [getattr(layer, name, None) for layer in layers for name in _SHAPES]
    return sum(value.numel() for value in values if isinstance(value, Tensor))


def notes(learned: Learned) -> list[str]:
    return [f"carries parameters for backend {backend!r} ({FILES[backend]})" for backend in learned]


def _cluster_params(
    path: Path, prefix: str, layer: LayerPlan, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str
) -> ClusterParams:
    _refuse_clusters(path, prefix, layer, tensors["clusters"])
    _refuse_dtypes(path, prefix, tensors)
    placed = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    try:
        return ClusterParams(**placed)
    except ValueError as error:
        raise _refusal(path, f"cannot be used: {prefix}.{error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _refusal(path, f"cannot be read ({error})") from error


def _refuse_names(path: Path, given: set[str], num_layers: int) -> None:
    known = [f"layers.{n}.{name}" for n in range(num_layers) for name in _SHAPES]
    needed = [name for name in known if name.rsplit(".", 1)[1] not in _OPTIONAL]
    lacking, unknown = [name for name in needed if name not in given], sorted(given.difference(known))
    counted = f"there are {num_layers} layers to which a choice applies, counted from 0"
    if unknown:
        raise _refusal(path, f"has unknown tensors: {_some(unknown)} ({counted})")
    if not num_layers:
        raise _refusal(path, "has nothing to belong to: the model has no layer to which a choice applies")
    if lacking:
        raise _refusal(path, f"lacks tensors: {_some(lacking)} ({counted})")


def _refuse_clusters(path: Path, prefix: str, layer: LayerPlan, clusters: Tensor) -> None:
    H, D = layer.num_heads, layer.shape.key_dim
    if clusters.ndim != 3 or (clusters.shape[0], clusters.shape[2]) != (H, D):
        given, wanted = list(clusters.shape), f"[{H}, any number, {D}] ([{_words('HCD')}])"
        raise _refusal(path, f"has {prefix}.clusters of shape {given}, expected {wanted}")


def _refuse_dtypes(path: Path, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise _refusal(path, f"has {prefix}.{name} of dtype {tensor.dtype}, expected one of {known}")


def _told_names(n: int) -> str:
    told = [
        f"layers.{n}.{name} [{_words(letters)}]" for name, letters in _SHAPES.items() if name not in _OPTIONAL
    ]
    return ", ".join(told)


def _words(letters: str) -> str:
    return ", ".join(_LETTERS[letter] for letter in letters)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (" ..." if len(names) > _MAX_NAMES else "")


def _refusal(path: Path, problem: str) -> ModelError:
    return ModelError(
        f"{path} {problem}. Save the tensors as models/learned.py describes them, or remove the file to "
        f"serve the model without backend {path.stem!r}"
    )
