"""Tiny random networks for the tests: every family the seam meets, seeded, with noise on every weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor

from kernels.registry import load as load_backend
from loadtests.tiny_models import byte_tokenizer
from models.contract import Choice, ModelInfo, Slice
from models.learned import FILES, read_learned
from models.network import build_network
from models.rotary import replace_rotary
from models.runner import Model
from models.seam import NAME, register
from models.self_test import self_test
from models.sequence import OpenSequence

VOCAB = 97
WIDTH: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


def llama(**more: Any) -> Any:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**WIDTH, **GROUPED, "num_hidden_layers": 3, "max_position_embeddings": 256, **more})
    )


def gemma3(**more: Any) -> Any:
    config = {**WIDTH, **GROUPED, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 9, **more}
    kind = hf.Gemma3TextModel if more.get("use_bidirectional_attention") else hf.Gemma3ForCausalLM
    return kind(hf.Gemma3TextConfig(**config))


def modernbert() -> Any:
    ids = {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    config = hf.ModernBertConfig(**{**WIDTH, **ids, "num_hidden_layers": 4, "local_attention": 12})
    return hf.ModernBertModel(config)


def roberta() -> Any:
    config = {**WIDTH, "pad_token_id": 1, "num_hidden_layers": 2, "max_position_embeddings": 80}
    return hf.RobertaModel(hf.RobertaConfig(**config), add_pooling_layer=False)


def bert() -> Any:
    return hf.BertModel(hf.BertConfig(**WIDTH, num_hidden_layers=2), add_pooling_layer=False)


def nomic(**more: Any) -> Any:
    return hf.NomicBertModel(hf.NomicBertConfig(**WIDTH, num_hidden_layers=2, **more))


def phi3() -> Any:
    config = {**WIDTH, **GROUPED, "num_hidden_layers": 2, "rope_parameters": dict(LONGROPE)}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 32}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**config, **lengths))


def decoder(config_class: Any, network_class: Any, **more: Any) -> Callable[[], Any]:
    return lambda: network_class(config_class(**{**WIDTH, **GROUPED, "num_hidden_layers": 3, **more}))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama, grouped heads": llama,
    "llama, dynamic rotary": lambda: llama(max_position_embeddings=32, rope_parameters=dict(DYNAMIC)),
    "qwen2": decoder(hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "qwen2, half its layers local": decoder(
        hf.Qwen2Config, hf.Qwen2ForCausalLM, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3, normed queries and keys": decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM, head_dim=16),
    "mistral, all layers local": decoder(hf.MistralConfig, hf.MistralForCausalLM, sliding_window=7),
    "gemma3, hybrid": gemma3,
    "gemma3, bidirectional": lambda: gemma3(use_bidirectional_attention=True),
    "granite, scaled logits": decoder(
        hf.GraniteConfig, hf.GraniteForCausalLM, logits_scaling=4.0, attention_multiplier=0.3
    ),
    "mixtral, experts": decoder(hf.MixtralConfig, hf.MixtralForCausalLM, num_local_experts=4),
    "gpt2, learned positions": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    ),
    "phi3, longrope": phi3,
    "bert": bert,
    "roberta, positions behind the padding index": roberta,
    "nomic": nomic,
    "nomic, dynamic rotary": lambda: nomic(
        max_position_embeddings=32, rope_parameters={**DYNAMIC, "rope_theta": 1e3}
    ),
    "modernbert, hybrid": modernbert,
}


def network(make: Callable[[], Any], seed: int = 0) -> Any:
    """A network with the seam's attention, in evaluation mode, with noise on every weight."""
    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = make().eval().requires_grad_(False)
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    made.set_attn_implementation(NAME)
    return made


def serve(made: Any, max_tokens: int = 64) -> Model:
    """The network as the service would have it, after its self-test."""
    offset = self_test(made, max_tokens)
    replace_rotary(made)
    built = build_network(made, max_tokens, offset)
    plan = built.plan
    info = ModelInfo(
        name="tiny",
        source="memory",
        revision=None,
        architecture=type(made).__name__,
        tasks=(),
        max_tokens=max_tokens,
        dtype="float32",
        device="cpu",
        causal=plan.causal,
        num_layers=len(plan.layers),
        applied_layers=plan.applied_layers,
        local_layers=plan.local_layers,
        embedding_dim=built.sizes.hidden_size,
        num_parameters=0,
    )
    return Model(built, info, None)


def cluster_tensors(
    num_layers: int, num_heads: int = 6, head_dim: int = 8, *, affinity: bool = False
) -> dict[str, Tensor]:
    """Random parameters for ``sbm``, with one cluster more from layer to layer."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = {}
    for n in range(num_layers):
        C, D = 3 + n, head_dim
        layer = {"clusters": random(num_heads, C, D), "w1": random(D, D), "b1": random(D)}
        layer |= {"w2": random(D, D) / D, "b2": random(D)}
        layer |= {"affinity": random(num_heads, C, C).abs() / 4} if affinity else {}
        found |= {f"layers.{n}.{name}": tensor for name, tensor in layer.items()}
    return found


def carrying(model: Model, *, affinity: bool = False) -> Model:
    """The same model with random parameters for the backends that need their own."""
    network = model._network
    plan = network.plan
    first = plan.layers[0]
    sizes = len(plan.applied_layers), first.num_heads, first.shape.key_dim
    tensors = cluster_tensors(*sizes, affinity=affinity)
    with TemporaryDirectory() as directory:
        save_file(tensors, Path(directory) / FILES["sbm"])
        learned = read_learned(Path(directory), plan, network.body.dtype, str(network.device))
    return Model(replace(network, learned=learned), model.info, model._tokenizer)


def choice(backend: str = "exact", seed: int = 0, **params: Any) -> Choice:
    return Choice(backend, load_backend(backend).params.model_validate(params), seed)


def random_ids(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (n,), generator=generator).tolist()


def read(model: Model, ids: list[int], wanted: Choice, state: OpenSequence | None = None) -> Tensor:
    """Hidden states [n, E] of one sequence read in one step."""
    state = state or model.open(len(ids))
    result = model.step([Slice(state, ids, wanted, "hidden", len(ids))]).results[0]
    assert result.hidden is not None
    return result.hidden


def alone(made: Any, ids: list[int], attention: str = "sdpa") -> Tensor:
    """Hidden states [n, E] by transformers itself. ``made`` is set back to the seam."""
    made.set_attn_implementation(attention)
    body = made if made.get_output_embeddings() is None else made.base_model
    with torch.no_grad():
        hidden: Tensor = body(input_ids=torch.tensor([ids]))[0][0]
    made.set_attn_implementation(NAME)
    return hidden


def close(got: Tensor | None, wanted: Tensor | None, tolerance: float = 1e-4) -> bool:
    assert got is not None and wanted is not None
    return float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def rust_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 97 ids: three special tokens, then bytes that the tests' texts use."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [c for c in alphabet if c.isascii()][: VOCAB - 12] + ["Ġ", "Ã", "©", "â", "Ĥ", "¬", "ð", "Ł"]
    return byte_tokenizer(dict.fromkeys(letters))


def tokenizer_files(directory: Path, template: str | None = None) -> None:
    """Save the tokenizer, with truncation and padding switched on in its file as careless exports have it."""
    made = rust_tokenizer()
    made.enable_truncation(8)
    made.enable_padding(length=16)
    wrapper = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=8
    )
    if template is not None:
        wrapper.chat_template = template
    wrapper.save_pretrained(directory)
