"""GGUF files, converted once into a Hugging Face directory (config.json, safetensors, tokenizer) in the
cache.

transformers reads most architectures. nomic-bert it does not read, so that one is mapped here by tensor name.
Quantised weights are unpacked to fp32 exactly as they are; fp16 weights stay fp16.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizer,
    GgufConfig,
    NomicBertConfig,
    NomicBertModel,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from models.contract import ModelError
from models.files import appearing, locked, sha256_of

VERSION = 1  # of the conversion: raise it when the converted files change

NOMIC_MAX_TOKENS = 8192
NOMIC_ROPE_FACTOR = 2.0

# Byte-level vocabularies that split text as GPT-2 does, and those that split off single digits first
_GPT2_SPLITS = {"default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"}
_DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def converted(
    path: Path, cache_dir: Path, progress: Callable[[str], object], sha256: str | None = None
) -> Path:
    """The Hugging Face directory of a GGUF file, converted on first use. ModelError where it cannot be."""
    digest = sha256 or sha256_of(path)
    final = cache_dir / "converted" / f"{path.stem}-{digest[:16]}-v{VERSION}"
    if final.is_dir():
        return final
    with locked(final):
        if not final.is_dir():
            progress(f"converting {path.name} (once)")
            with appearing(final) as directory:
                _convert(path, directory)
    return final


def _convert(path: Path, directory: Path) -> None:
    try:
        fields = GGUFReader(path).fields
        architecture = str(fields["general.architecture"].contents())
        convert = _convert_nomic if architecture == "nomic-bert" else _convert_mapped
        convert(path, directory)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path.name} cannot be converted: {error}. "
            "Convert it to a Hugging Face directory with safetensors"
        ) from error
    licence = fields.get("general.license")
    if licence is not None:
        (directory / "README.md").write_text(f"---\nlicense: {licence.contents()}\n---\n")


def _convert_mapped(path: Path, directory: Path) -> None:
    """An architecture that transformers reads from GGUF."""
    place = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "trust_remote_code": False,
    }
    tokenizer = AutoTokenizer.from_pretrained(**place)
    pre = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if pre is not None:
        _set_splitting(tokenizer, str(pre.contents()))
    tokenizer.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(directory)


def _set_splitting(tokenizer: Any, pre: str) -> None:
    """Split text as the vocabulary was learnt. transformers takes GPT-2's splitting for a name it does not
    know."""
    backend = tokenizer.backend_tokenizer
    if pre == "qwen2":  # the file does not say that Qwen normalises
        backend.normalizer = normalizers.NFC()
    if pre in GGUF_PRE_TOKENIZER_SPLITS or pre in _GPT2_SPLITS:
        return
    if pre not in _DIGIT_SPLITS:
        raise ModelError(f"its tokenizer splits text in a way that is not known here ({pre!r})")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


_NOMIC_NAMES = {
    r"token_embd\.weight": "embeddings.word_embeddings.weight",
    r"token_types\.weight": "embeddings.token_type_embeddings.weight",
    r"token_embd_norm\.(weight|bias)": r"embeddings.LayerNorm.\1",
    r"blk\.(\d+)\.attn_output\.weight": r"layers.\1.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": r"layers.\1.mlp.\2_proj.weight",
    r"blk\.(\d+)\.attn_output_norm\.(weight|bias)": r"layers.\1.post_attention_layernorm.\2",
    r"blk\.(\d+)\.layer_output_norm\.(weight|bias)": r"layers.\1.post_mlp_layernorm.\2",
}
_NOMIC_QKV = re.compile(r"blk\.(\d+)\.attn_qkv\.weight")


def _convert_nomic(path: Path, directory: Path) -> None:
    """nomic-bert: rotary, SwiGLU, fused query-key-value; beyond the trained 2,048 tokens by dynamic NTK."""
    reader = GGUFReader(path)
    config = _nomic_config(reader)
    config.architectures = ["NomicBertModel"]
    state = _nomic_state(reader)
    with torch.device("meta"):
        network = NomicBertModel(config)
    wanted = set(network.state_dict())
    if wanted != set(state):
        raise ModelError(f"its tensors are not nomic-bert's: {sorted(wanted ^ set(state))[:6]}")
    network.load_state_dict(state, assign=True)
    network.save_pretrained(directory)
    _nomic_tokenizer(reader).save_pretrained(directory)
    _write_sentence_files(directory)


def _nomic_config(reader: GGUFReader) -> NomicBertConfig:
    def read(key: str) -> Any:
        return reader.fields[f"nomic-bert.{key}"].contents()

    return NomicBertConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].contents()),
        hidden_size=int(read("embedding_length")),
        num_hidden_layers=int(read("block_count")),
        num_attention_heads=int(read("attention.head_count")),
        intermediate_size=int(read("feed_forward_length")),
        layer_norm_eps=float(read("attention.layer_norm_epsilon")),
        max_position_embeddings=int(read("context_length")),
        rope_parameters={
            "rope_type": "dynamic",
            "rope_theta": float(read("rope.freq_base")),
            "factor": NOMIC_ROPE_FACTOR,
        },
    )


def _nomic_state(reader: GGUFReader) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        half = tensor.tensor_type == GGMLQuantizationType.F16
        values = torch.tensor(tensor.data if half else dequantize(tensor.data, tensor.tensor_type))
        fused = _NOMIC_QKV.fullmatch(tensor.name)
        if fused:
            for letter, part in zip("qkv", values.chunk(3), strict=True):
                state[f"layers.{fused[1]}.self_attn.{letter}_proj.weight"] = part.clone()
        else:
            state[_nomic_name(tensor.name)] = values
    return state


def _nomic_name(name: str) -> str:
    for pattern, replacement in _NOMIC_NAMES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ModelError(f"unexpected tensor {name!r}")


def _nomic_tokenizer(reader: GGUFReader) -> BertTokenizer:
    """BERT WordPiece from the file's own list, which marks words that begin instead of pieces that go on."""
    tokens = list(reader.fields["tokenizer.ggml.tokens"].contents())
    vocab = {_wordpiece(token): index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or not {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} <= set(vocab):
        raise ModelError("its token list is not a BERT WordPiece vocabulary")
    return BertTokenizer(vocab=vocab, do_lower_case=True)


def _wordpiece(token: str) -> str:
    if token.startswith("▁"):
        return token[1:]
    return token if re.fullmatch(r"\[.+\]", token) else f"##{token}"


def _write_sentence_files(directory: Path) -> None:
    """How sentence-transformers says: mean pooling, normalised, up to 8,192 tokens."""
    kind = "sentence_transformers.models"
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{kind}.Normalize"},
        ],
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": NOMIC_MAX_TOKENS},
    }
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(content))
