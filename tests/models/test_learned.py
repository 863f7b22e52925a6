"""Parameters that a model carries beside its weights: read, checked, attached, and missed where they are not
there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.math.sbm import ClusterParams
from models.contract import ModelError, Slice
from models.learned import FILES, num_parameters
from models.loader import load_model
from models.runner import Model
from tests.models.tiny import (
    bert,
    carrying,
    choice,
    close,
    cluster_tensors,
    gemma3,
    llama,
    network,
    random_ids,
    read,
    serve,
    tokenizer_files,
)

Tensors = dict[str, Tensor]
Load = Callable[..., Model]


def quiet(_: str) -> None:
    return None


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A tiny model loaded from a directory that carries these tensors for ``sbm``."""

    def load(tensors: Tensors | None, make: Callable[[], Any] = llama, **options: Any) -> Model:
        network(make).save_pretrained(tmp_path)
        tokenizer_files(tmp_path)
        if tensors is not None:
            save_file(tensors, tmp_path / FILES["sbm"])
        model = load_model("tiny", str(tmp_path), progress=quiet, **options)
        assert isinstance(model, Model)
        return model

    return load


def test_every_layer_to_which_a_choice_applies_has_its_own_parameters(load: Load) -> None:
    tensors = cluster_tensors(3, affinity=True)
    del tensors["layers.1.affinity"]
    model = load(tensors)
    layers = model._network.learned["sbm"]
    assert [layer.num_clusters for layer in layers if isinstance(layer, ClusterParams)] == [3, 4, 5]
    for n, layer in enumerate(layers):
        assert isinstance(layer, ClusterParams)
        for name in ("clusters", "w1", "b1", "w2", "b2"):
            assert torch.equal(getattr(layer, name), tensors[f"layers.{n}.{name}"])
        assert (layer.affinity is None) == (n == 1)


def test_they_count_as_parameters_and_the_model_says_that_it_carries_them(load: Load) -> None:
    tensors = cluster_tensors(3)
    plain, model = load(None), load(tensors)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert num_parameters(model._network.learned) == numbers
    assert model.info.num_parameters == plain.info.num_parameters + numbers
    assert any("'sbm' (sbm.safetensors)" in note for note in model.info.notes)
    assert plain._network.learned == {} and not any("sbm" in note for note in plain.info.notes)


def test_they_take_the_weights_dtype(load: Load) -> None:
    (first, *_) = load(cluster_tensors(3), dtype="bfloat16")._network.learned["sbm"]
    assert isinstance(first, ClusterParams) and first.clusters.dtype == first.b1.dtype == torch.bfloat16


def test_layers_with_a_window_of_their_own_need_none(load: Load) -> None:
    tensors = cluster_tensors(1, head_dim=16)
    model = load(tensors, gemma3)
    assert model.info.applied_layers == (5,) and len(model._network.learned["sbm"]) == 1
    hidden = read(model, random_ids(40), choice("sbm"))
    assert hidden.isfinite().all() and not close(hidden, read(model, random_ids(40), choice()), 1e-3)


def changed(**tensors: Tensor | None) -> Tensors:
    """Good tensors with some of layer 1 replaced, or left out (None)."""
    found = cluster_tensors(3, affinity=True)
    for name, tensor in tensors.items():
        del found[f"layers.1.{name}"]
        if tensor is not None:
            found[f"layers.1.{name}"] = tensor
    return found


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (changed(w1=None), ["lacks tensors: layers.1.w1 ", "3 layers"]),
        (cluster_tensors(2), ["lacks tensors: layers.2.clusters", "layers.2.b2 (there are 3"]),
        ({}, ["lacks tensors: layers.0.clusters"]),
        (cluster_tensors(4), ["unknown tensors: layers.3.b1", "3 layers to which a choice applies"]),
        (cluster_tensors(3) | {"clusters": torch.ones(1)}, ["unknown tensors: clusters"]),
        (
            changed(clusters=torch.ones(6, 4, 9)),
            ["layers.1.clusters of shape [6, 4, 9]", "[6, any number, 8]"],
        ),
        (changed(clusters=torch.ones(2, 4, 8)), ["layers.1.clusters of shape [2, 4, 8]", "query heads"]),
        (changed(clusters=torch.ones(6, 8)), ["layers.1.clusters of shape [6, 8]"]),
        (changed(clusters=torch.ones(6, 0, 8)), ["layers.1.clusters must be", "[6, 0, 8]"]),
        (changed(w2=torch.ones(8, 9)), ["layers.1.w2 must be", "[8, 8]", "[8, 9]"]),
        (changed(b1=torch.ones(1)), ["layers.1.b1 must be", "[8]", "[1]"]),
        (changed(affinity=torch.ones(6, 3, 3)), ["layers.1.affinity must be", "[6, 4, 4]", "[6, 3, 3]"]),
        (changed(affinity=-torch.ones(6, 4, 4)), ["layers.1.affinity must not be negative"]),
        (changed(b2=torch.full((8,), torch.nan)), ["layers.1.b2 must be finite"]),
        (changed(b2=torch.ones(8, dtype=torch.int32)), ["layers.1.b2 of dtype torch.int32", "float32"]),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name_with_the_way_out(
    load: Load, tensors: Tensors, told: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        load(tensors)
    message = str(caught.value)
    assert "sbm.safetensors" in message and "remove the file" in message
    for part in told:
        assert part in message


def test_a_model_without_a_layer_for_it_refuses_the_file(load: Load) -> None:
    from tests.models.tiny import FAMILIES

    with pytest.raises(ModelError, match="unknown tensors.*0 layers"):
        load(cluster_tensors(3), FAMILIES["mistral, all layers local"])


def test_a_damaged_file_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / FILES["sbm"]).write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match=r"sbm\.safetensors cannot be read"):
        load(None)


def test_a_directory_with_nothing_but_such_a_file_has_no_weights(tmp_path: Path) -> None:
    network(llama).config.save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    save_file(cluster_tensors(3), tmp_path / FILES["sbm"])
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        load_model("tiny", str(tmp_path), progress=quiet)


@pytest.mark.parametrize("make", [llama, bert])
def test_a_backend_without_its_parameters_is_refused_with_what_is_missing(make: Callable[[], Any]) -> None:
    model = serve(network(make))
    (reason,) = model.unsupported(choice("sbm"))
    assert "'sbm' needs parameters of its own, which 'tiny' does not carry" in reason
    assert "sbm.safetensors beside its weights" in reason and "layers.0.clusters" in reason
    assert carrying(model).unsupported(choice("sbm")) == []


@pytest.mark.parametrize("affinity", [False, True])
def test_each_layer_is_given_its_own_parameters(affinity: bool) -> None:
    """With those of one layer changed, all before it stay as they were and it does not."""
    model = carrying(serve(network(llama), 64), affinity=affinity)
    ids, seen = random_ids(60), []
    for cut in (None, 1):
        layers = list(model._network.learned["sbm"])
        if cut is not None:
            layers[cut] = layers[0]
        other = Model(_with(model, layers), model.info, None)
        work = other.step([Slice(other.open(60), ids, choice("sbm"), "hidden", 60)]).results[0].work
        seen.append(work.kept_per_head)
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]
    assert sum(sum(heads) for heads in seen[0].values()) > 0 and len(seen[0]) == 3


def _with(model: Model, layers: list[object]) -> Any:
    from dataclasses import replace

    return replace(model._network, learned={"sbm": layers})
