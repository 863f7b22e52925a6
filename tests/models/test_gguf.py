"""GGUF files become Hugging Face directories once, with the same numbers and the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from models.contract import ModelError, Slice
from models.gguf_convert import _wordpiece, converted
from models.loader import load_model
from tests.models.tiny import VOCAB, alone, choice, close, llama, network, nomic, random_ids, rust_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def quiet(_: str) -> None:
    return None


def rotary_order(weight: torch.Tensor, heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp interleaves the two halves of each head's rotary dimensions."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).numpy()


def write_llama(path: Path, made: Any, pre: str = "smollm") -> None:
    config, out = made.config, gguf.GGUFWriter(path, "llama")
    out.add_name("tiny")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(VOCAB)
    vocab = sorted(rust_tokenizer().get_vocab().items(), key=lambda item: item[1])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    tokens = [token for token, _ in vocab] + ["AB"]
    out.add_token_list(tokens + [f"<unused{i}>" for i in range(VOCAB - len(tokens))])
    out.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    out.add_token_merges(["A B"])
    out.add_pad_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    names = {
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    out.add_tensor("token_embd.weight", made.model.embed_tokens.weight.numpy())
    out.add_tensor("output_norm.weight", made.model.norm.weight.numpy())
    out.add_tensor("output.weight", made.lm_head.weight.numpy())
    for i, layer in enumerate(made.model.layers):
        for ours, theirs in names.items():
            out.add_tensor(f"blk.{i}.{theirs}.weight", layer.get_submodule(ours).weight.numpy())
        attention, kv_heads = layer.self_attn, config.num_key_value_heads
        out.add_tensor(
            f"blk.{i}.attn_q.weight", rotary_order(attention.q_proj.weight, config.num_attention_heads)
        )
        out.add_tensor(f"blk.{i}.attn_k.weight", rotary_order(attention.k_proj.weight, kv_heads))
        out.add_tensor(f"blk.{i}.attn_v.weight", attention.v_proj.weight.numpy())
    finish(out)


def finish(out: gguf.GGUFWriter) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁a", "▁whale", "s", "▁rose", "▁,"]


def write_nomic(path: Path, made: Any, change: Callable[[str], str] = str) -> None:
    config, out = made.config, gguf.GGUFWriter(path, "nomic-bert")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_layer_norm_eps(config.layer_norm_eps)
    out.add_rope_freq_base(1000.0)
    out.add_tokenizer_model("bert")
    out.add_token_list(BERT_TOKENS + [f"[unused{i}]" for i in range(VOCAB - len(BERT_TOKENS))])
    names = {"self_attn.o_proj": "attn_output", "post_attention_layernorm": "attn_output_norm"}
    names |= {"post_mlp_layernorm": "layer_output_norm"}
    names |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    tensors = {
        "token_embd.weight": made.embeddings.word_embeddings.weight.half(),
        "token_types.weight": made.embeddings.token_type_embeddings.weight,
        "token_embd_norm.weight": made.embeddings.LayerNorm.weight,
        "token_embd_norm.bias": made.embeddings.LayerNorm.bias,
    }
    for i, layer in enumerate(made.layers):
        for ours, theirs in names.items():
            module = layer.get_submodule(ours)
            tensors |= {f"blk.{i}.{theirs}.{kind}": value for kind, value in module.named_parameters()}
        parts = [layer.get_submodule(f"self_attn.{x}_proj").weight for x in "qkv"]
        tensors[f"blk.{i}.attn_qkv.weight"] = torch.cat(parts)
    for name, value in tensors.items():
        out.add_tensor(change(name), value.numpy())
    finish(out)


def test_a_llama_file_is_converted_once_and_computes_what_its_network_does(tmp_path: Path) -> None:
    made = network(llama)
    write_llama(tmp_path / "tiny.gguf", made)
    said: list[str] = []
    model = load_model(
        "tiny", str(tmp_path / "tiny.gguf"), cache_dir=tmp_path / "cache", progress=said.append
    )
    ids = random_ids(40)
    got = model.step([Slice(model.open(40), ids, choice(), "hidden", 40)]).results[0].hidden
    assert close(got, alone(made, ids))
    assert model.info.eos_token_ids == (2,) and model.info.tasks == ("generate", "score", "encode")
    text = "AB 12 (C)"
    encoding = model.tokenizer.encode(text)
    assert model.tokenizer.decode(encoding.token_ids) == text
    again: list[str] = []
    load_model("tiny", str(tmp_path / "tiny.gguf"), cache_dir=tmp_path / "cache", progress=again.append)
    assert any("converting" in line for line in said) and not any("converting" in line for line in again)


def test_an_unknown_way_of_splitting_text_is_refused_instead_of_guessed(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny.gguf", network(llama), pre="brand-new")
    with pytest.raises(ModelError, match="splits text in a way that is not known here .'brand-new'"):
        converted(tmp_path / "tiny.gguf", tmp_path / "cache", quiet)
    assert not any(p.is_dir() for p in (tmp_path / "cache" / "converted").iterdir())


def test_a_nomic_file_is_mapped_by_tensor_name(tmp_path: Path) -> None:
    made = network(lambda: nomic(max_position_embeddings=2048))
    made.embeddings.word_embeddings.weight.copy_(made.embeddings.word_embeddings.weight.half().float())
    write_nomic(tmp_path / "tiny.gguf", made)
    model = load_model("tiny", str(tmp_path / "tiny.gguf"), cache_dir=tmp_path / "cache", progress=quiet)
    ids = random_ids(60)
    got = model.step([Slice(model.open(60), ids, choice(), "hidden", 60)]).results[0].hidden
    assert close(got, alone(made, ids))
    assert model.info.max_tokens == 8192 and model.info.pooling == "mean"
    assert model.tokenizer.encode("Whales rose").token_ids == [2, 6, 7, 8, 3]


def test_a_nomic_file_with_other_tensors_is_refused_by_name(tmp_path: Path) -> None:
    made = network(nomic)
    write_nomic(tmp_path / "extra.gguf", made, lambda n: n.replace("ffn_gate", "ffn_gate_inp"))
    with pytest.raises(ModelError, match="unexpected tensor 'blk.0.ffn_gate_inp.weight'"):
        converted(tmp_path / "extra.gguf", tmp_path / "cache", quiet)
    del made.layers[1]
    write_nomic(tmp_path / "short.gguf", made)
    with pytest.raises(ModelError, match="tensors are not nomic-bert's: .'layers.1"):
        converted(tmp_path / "short.gguf", tmp_path / "cache", quiet)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all" * 50])
def test_a_damaged_file_is_refused_and_leaves_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf cannot be converted"):
        converted(tmp_path / "bad.gguf", tmp_path / "cache", quiet)
    assert not any(p.is_dir() for p in (tmp_path / "cache" / "converted").iterdir())


def test_word_pieces_are_spelt_as_bert_spells_them() -> None:
    assert [_wordpiece(t) for t in ("▁whale", "s", "[CLS]", "▁[")] == ["whale", "##s", "[CLS]", "["]
