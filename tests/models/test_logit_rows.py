"""Logits of named rows, beside whatever else a slice wants."""

from __future__ import annotations

import pytest
import torch

from models.contract import Slice, StepResult, Want
from models.runner import Model
from tests.models.tiny import VOCAB, bert, choice, llama, network, random_ids, serve

WINDOW = choice("window", window=16)
OTHER = choice("pooled", query_tile=128, block_size=32, budget=64)


@pytest.fixture(scope="module")
def model() -> Model:
    return serve(network(llama).double())


def run(model: Model, slices: list[Slice], in_pieces: bool) -> StepResult:
    if not in_pieces:
        return model.step(slices)
    forward = model.begin(slices)
    while (result := forward.advance(lambda: True)) is None:
        pass
    return result


@pytest.mark.parametrize("want", ["nothing", "logits", "scores", "hidden"])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_the_logits_of_rows_named_are_those_of_each_row(
    model: Model, want: Want, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.head.ROWS_AT_ONCE", 3)
    ids, rows = random_ids(20), (3, 0, 19, 3, 7)
    targets = ids if want == "scores" else ()
    part = Slice(model.open(20), ids, WINDOW, want, 20, targets, logit_rows=rows)
    other = Slice(model.open(20), ids, OTHER, "logits", 20)
    result, neighbour = run(model, [part, other], in_pieces).results
    assert result.row_logits is not None and neighbour.row_logits is None
    assert result.row_logits.shape == (5, VOCAB) and result.row_logits.dtype == torch.float32
    state = model.open(20)
    for i, token in enumerate(ids):
        logits = model.step([Slice(state, [token], WINDOW, "logits", 20)]).results[0].logits
        assert logits is not None
        for place in [place for place, row in enumerate(rows) if row == i]:
            assert torch.allclose(result.row_logits[place], logits, atol=1e-4)
    assert (result.logits is None) == (want != "logits") and (result.scores is None) == (want != "scores")


def test_rows_of_logits_must_be_rows_of_the_slice_and_of_a_language_model(model: Model) -> None:
    for rows in ((-1,), (0, 5)):
        with pytest.raises(ValueError, match=r"slice 0: logit_rows must lie in 0 .. 4"):
            model.step([Slice(model.open(5), random_ids(5), WINDOW, "nothing", 5, logit_rows=rows)])
    encoder = serve(network(bert), 64)
    with pytest.raises(ValueError, match="logit_rows needs a causal language model"):
        encoder.step([Slice(encoder.open(5), random_ids(5), WINDOW, "hidden", 5, logit_rows=(1,))])
