"""What the seam does not implement is refused at load, with a reason a reader understands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from models import self_test as self_test_module
from models.contract import ModelError
from models.masks import read_mask
from models.seam import MaskRequest
from models.self_test import self_test
from models.shrink import shrink
from tests.models.tiny import GROUPED, WIDTH, gemma3, llama, network

ENCODER_DECODER = {"vocab_size": 97, "d_model": 48, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma2": (
        lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**WIDTH, **GROUPED, num_hidden_layers=2, head_dim=16, sliding_window=8)
        ),
        "soft-capped attention logits",
    ),
    "gpt-oss": (
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**WIDTH, **GROUPED, num_hidden_layers=2, head_dim=16, num_local_experts=4)
        ),
        "learned attention sinks",
    ),
    "t5": (lambda: hf.T5Model(hf.T5Config(**ENCODER_DECODER)), "is an encoder-decoder"),
    "t5 encoder": (lambda: hf.T5EncoderModel(hf.T5Config(**ENCODER_DECODER)), "transformers' interface"),
    "mpnet": (
        lambda: hf.MPNetModel(hf.MPNetConfig(**WIDTH, num_hidden_layers=2)),
        "does not dispatch its attention",
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, state_size=4)
        ),
        "convolution or state space",
    ),
    "llama4, chunked attention": (
        lambda: hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(
                **WIDTH,
                **GROUPED,
                num_hidden_layers=4,
                head_dim=16,
                attention_chunk_size=8,
                num_local_experts=2,
                intermediate_size_mlp=64,
            )
        ),
        "chunked_attention",
    ),
    "lfm2, convolutions": (
        lambda: hf.Lfm2ForCausalLM(
            hf.Lfm2Config(**WIDTH, **GROUPED, num_hidden_layers=2, layer_types=["conv", "full_attention"])
        ),
        "layers of type",
    ),
    "gemma3n, shared keys and values": (
        lambda: hf.Gemma3nForCausalLM(
            hf.Gemma3nTextConfig(
                **WIDTH,
                **GROUPED,
                num_hidden_layers=3,
                head_dim=16,
                num_kv_shared_layers=1,
                vocab_size_per_layer_input=97,
            )
        ),
        "shares keys and values between layers",
    ),
    "bert with cross attention": (
        lambda: hf.BertModel(
            hf.BertConfig(**WIDTH, num_hidden_layers=2, is_decoder=True, add_cross_attention=True)
        ),
        "cross attention",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_an_architecture_that_the_seam_cannot_serve_is_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        self_test(network(make), 64)


class MixesTokens(nn.Module):
    """A layer that looks at its neighbour on the packed axis, as a convolution does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden) + 0.1 * hidden.roll(1, dims=1)


def test_a_network_that_mixes_tokens_outside_attention_fails_its_self_test() -> None:
    made = network(llama)
    made.model.layers[1].mlp = MixesTokens(made.model.layers[1].mlp)
    with pytest.raises(ModelError, match="two packed sequences differ"):
        self_test(made, 64)


def test_a_network_that_counts_positions_itself_fails_its_self_test() -> None:
    made = network(llama)
    rotary = made.model.rotary_emb

    def own_positions(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return type(rotary).forward(rotary, x, torch.arange(x.shape[1])[None])

    made.model.rotary_emb.forward = own_positions
    with pytest.raises(ModelError, match="failed its self-test"):
        self_test(made, 64)


@pytest.mark.parametrize("wrong_by", [-1, 1])
def test_a_window_wrong_by_one_key_fails_the_self_test(
    wrong_by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import plan

    right = plan.read_mask

    def wrong(*args: Any) -> tuple[bool, int | None]:
        causal, window = right(*args)
        return causal, None if window is None else window + wrong_by

    monkeypatch.setattr(plan, "read_mask", wrong)
    with pytest.raises(ModelError, match="two packed sequences differ"):
        self_test(network(gemma3), 64)


def test_dropout_in_evaluation_mode_is_refused() -> None:
    made = network(lambda: llama(attention_dropout=0.5))
    for layer in made.model.layers:
        layer.self_attn.training = True
    with pytest.raises(ModelError, match="drops attention weights"):
        self_test(made, 64)


def test_a_position_dependent_mask_over_data_is_refused() -> None:
    kinds = torch.tensor([[0, 0, 1]])
    request = MaskRequest(lambda b, h, q, k: kinds[b, q] == kinds[b, k], None, None)
    with pytest.raises(ModelError, match="depends on more than positions"):
        read_mask(request, "Prefix", 64)


def test_a_prefix_mask_is_refused() -> None:
    request = MaskRequest(lambda b, h, q, k: (k <= q) | (k < 4), None, None)
    with pytest.raises(ModelError, match="neither causal nor bidirectional"):
        read_mask(request, "Prefix", 64)


def test_a_window_as_long_as_the_context_is_none_at_all() -> None:
    request = MaskRequest(lambda b, h, q, k: (k <= q) & (k > q - 64), 64, None)
    assert read_mask(request, "Wide", 64) == (True, None)
    assert read_mask(request, "Wide", 65) == (True, 64)


@pytest.mark.parametrize("make", [llama, gemma3])
def test_the_shrunken_copy_is_small_and_keeps_every_type_of_layer(make: Callable[..., Any]) -> None:
    large = network(lambda: make(intermediate_size=512, sliding_window=33))
    small = shrink(large)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in large.parameters())
    assert set(getattr(small.config, "layer_types", None) or []) == set(
        getattr(large.config, "layer_types", None) or []
    )
    assert self_test(small, 64) == 0
    assert large.config.intermediate_size == 512, "the original is left as it was"


def test_a_model_too_large_to_check_itself_is_checked_on_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    run = self_test_module._run
    monkeypatch.setattr(self_test_module, "DIRECT_FLOPS", 1)
    monkeypatch.setattr(self_test_module, "_run", lambda made, n: checked.append(made) or run(made, n))
    made = network(lambda: gemma3(intermediate_size=512))
    assert self_test(made, 64) == 0
    assert len(checked) == 1 and checked[0] is not made
