"""Two random networks small enough that ten thousand requests take minutes: what they say means nothing.

    python -m loadtests.tiny_models DIR

writes DIR/tiny-decoder (Llama, with a chat template) and DIR/tiny-encoder (BERT, mean pooling), each of four
layers and with a byte-level tokenizer, and prints the flags that serve them. The same files every time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<pad>", "<s>", "</s>")
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_HEADS, MAX_TOKENS = 96, 192, 4, 6, 2, 4096
DEVIATION = 0.05
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Array = np.ndarray[Any, np.dtype[np.float32]]


def byte_tokenizer(letters: Iterable[str]) -> Tokenizer:
    """One token per byte among ``letters`` (as byte-level alphabets spell them), after three special ones."""
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *letters])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return made


def write_models(directory: Path) -> dict[str, Path]:
    """Both networks as directories below ``directory``, by the name to serve them under."""
    written = {}
    for seed, write in enumerate((_write_decoder, _write_encoder)):
        name = write.__name__.removeprefix("_write_")
        written[f"tiny-{name}"] = path = directory / f"tiny-{name}"
        path.mkdir(parents=True, exist_ok=True)
        write(path, np.random.default_rng(seed), _write_tokenizer(path))
    return written


def serve_flags(written: dict[str, Path]) -> list[str]:
    return [word for name, path in written.items() for word in ("--model", f"{name}={path}")]


def _write_decoder(path: Path, draw: np.random.Generator, vocab_size: int) -> None:
    width = HIDDEN // HEADS * KEY_HEADS
    tensors = {
        "model.embed_tokens": _matrix(draw, vocab_size, HIDDEN),
        "lm_head": _matrix(draw, vocab_size, HIDDEN),
    }
    tensors["model.norm"] = np.ones(HIDDEN, np.float32)
    for n in range(LAYERS):
        layer = {f"self_attn.{x}_proj": _matrix(draw, HIDDEN, HIDDEN) for x in "qo"}
        layer |= {f"self_attn.{x}_proj": _matrix(draw, width, HIDDEN) for x in "kv"}
        layer |= {f"mlp.{x}_proj": _matrix(draw, INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        layer |= {"mlp.down_proj": _matrix(draw, HIDDEN, INTERMEDIATE)}
        layer |= {f"{x}_layernorm": np.ones(HIDDEN, np.float32) for x in ("input", "post_attention")}
        tensors |= {f"model.layers.{n}.{name}": tensor for name, tensor in layer.items()}
    save_file({f"{name}.weight": tensor for name, tensor in tensors.items()}, path / "model.safetensors", _PT)
    _write_json(
        path / "config.json",
        _config("LlamaForCausalLM", "llama", vocab_size)
        | {
            "hidden_act": "silu",
            "num_key_value_heads": KEY_HEADS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )


def _write_encoder(path: Path, draw: np.random.Generator, vocab_size: int) -> None:
    sizes = {"word": vocab_size, "position": MAX_TOKENS, "token_type": 2}
    tensors = {f"embeddings.{x}_embeddings.weight": _matrix(draw, rows, HIDDEN) for x, rows in sizes.items()}
    tensors |= _norm("embeddings")
    for n in range(LAYERS):
        layer = f"encoder.layer.{n}"
        for name in ("query", "key", "value"):
            tensors |= _dense(draw, f"{layer}.attention.self.{name}", HIDDEN, HIDDEN)
        tensors |= _dense(draw, f"{layer}.attention.output.dense", HIDDEN, HIDDEN)
        tensors |= _norm(f"{layer}.attention.output")
        tensors |= _dense(draw, f"{layer}.intermediate.dense", INTERMEDIATE, HIDDEN)
        tensors |= _dense(draw, f"{layer}.output.dense", HIDDEN, INTERMEDIATE)
        tensors |= _norm(f"{layer}.output")
    save_file(tensors, path / "model.safetensors", _PT)
    _write_json(
        path / "config.json",
        _config("BertModel", "bert", vocab_size)
        | {
            "hidden_act": "gelu",
            "pad_token_id": 0,
            "type_vocab_size": 2,
        },
    )
    (path / "1_Pooling").mkdir(exist_ok=True)
    _write_json(path / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    parts = [{"path": at, "type": f"sentence_transformers.models.{kind}"} for at, kind in kinds.items()]
    _write_json(path / "modules.json", parts)


_PT = {"format": "pt"}


def _config(network: str, kind: str, vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": [network],
        "model_type": kind,
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_TOKENS,
    }


def _write_tokenizer(path: Path) -> int:
    """Every byte and three special tokens; their number."""
    made = byte_tokenizer(sorted(pre_tokenizers.ByteLevel.alphabet()))
    made.save(str(path / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS}
    _write_json(path / "tokenizer_config.json", {**kind, **names, "chat_template": CHAT_TEMPLATE})
    return int(made.get_vocab_size())


def _matrix(draw: np.random.Generator, rows: int, columns: int) -> Array:
    return DEVIATION * draw.standard_normal((rows, columns), np.float32)


def _dense(draw: np.random.Generator, name: str, rows: int, columns: int) -> dict[str, Array]:
    return {f"{name}.weight": _matrix(draw, rows, columns), f"{name}.bias": np.zeros(rows, np.float32)}


def _norm(name: str) -> dict[str, Array]:
    ones, zeros = np.ones(HIDDEN, np.float32), np.zeros(HIDDEN, np.float32)
    return {f"{name}.LayerNorm.weight": ones, f"{name}.LayerNorm.bias": zeros}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.tiny_models", description=__doc__.split("\n")[0]
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    print(" ".join(serve_flags(write_models(parser.parse_args(argv).directory))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
