"""Loading: what is accepted, what is refused and why, and what a model directory says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from models.contract import ModelError, Slice, as_json
from models.loader import load_model
from tests.models.tiny import (
    FAMILIES,
    alone,
    bert,
    choice,
    close,
    llama,
    network,
    random_ids,
    roberta,
    tokenizer_files,
)


def quiet(_: str) -> None:
    return None


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny network with a tokenizer as a model directory."""

    def save(make: Callable[[], Any] = llama, **config: Any) -> Path:
        made = network(make)
        directory = tmp_path / "model"
        made.save_pretrained(directory)
        tokenizer_files(directory)
        if config:
            path = directory / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return directory

    return save


@pytest.mark.parametrize(
    "name",
    [
        "llama, grouped heads",
        "qwen2, half its layers local",
        "bert",
        "nomic, dynamic rotary",
        "modernbert, hybrid",
    ],
)
def test_a_directory_of_safetensors_is_served_as_transformers_computes_it(
    name: str, saved: Callable[..., Path]
) -> None:
    directory = saved(FAMILIES[name])
    model = load_model("tiny", str(directory), progress=quiet)
    ids = random_ids(30)
    got = model.step([Slice(model.open(30), ids, choice(), "hidden", 30)]).results[0].hidden
    assert close(got, alone(network(FAMILIES[name]), ids))
    assert model.info.source == str(directory) and as_json(model.info)["id"] == "tiny"


def test_a_causal_language_model_generates_scores_and_encodes(saved: Callable[..., Path]) -> None:
    info = load_model("tiny", str(saved()), progress=quiet).info
    assert info.tasks == ("generate", "score", "encode") and info.causal and info.pooling == "last"
    assert info.eos_token_ids == (2,) and info.max_tokens == 256 and info.architecture == "LlamaForCausalLM"


def test_an_encoder_encodes(saved: Callable[..., Path]) -> None:
    info = load_model("tiny", str(saved(bert)), progress=quiet).info
    assert info.tasks == ("encode",) and not info.causal and info.pooling == "mean"
    assert info.eos_token_ids == () and info.embedding_dim == 48


def test_positions_that_begin_behind_the_padding_index_shorten_the_limit(saved: Callable[..., Path]) -> None:
    model = load_model("tiny", str(saved(roberta)), progress=quiet)
    assert model.info.max_tokens == 78
    ids = random_ids(78)
    got = model.step([Slice(model.open(78), ids, choice(), "hidden", 78)]).results[0].hidden
    assert close(got, alone(network(roberta), ids))


def test_a_checkpoint_of_another_head_loads_its_body(saved: Callable[..., Path]) -> None:
    config = hf.BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64
    )
    model = load_model("tiny", str(saved(lambda: hf.BertForMaskedLM(config))), progress=quiet)
    assert model.info.architecture == "BertModel" and model.info.tasks == ("encode",)


def test_bfloat16_is_checked_and_served(saved: Callable[..., Path]) -> None:
    model = load_model("tiny", str(saved()), dtype="bfloat16", progress=quiet)
    result = model.step([Slice(model.open(9), random_ids(9), choice(), "logits", 9)]).results[0]
    assert result.logits is not None and result.logits.dtype == torch.float32


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_alone_are_refused_unread(name: str, saved: Callable[..., Path]) -> None:
    directory = saved()
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(ModelError, match=f"only pickled weights .{name}.*save_pretrained"):
        load_model("tiny", str(directory), progress=quiet)


def canary(directory: Path) -> Path:
    """Code in the model directory that leaves a file behind when it is run."""
    sign = directory / "code-ran"
    (directory / "code.py").write_text(f"open({str(sign)!r}, 'w')\nclass Config: pass\nclass Network: pass\n")
    return sign


def test_code_named_by_auto_map_never_runs_where_the_type_is_native(saved: Callable[..., Path]) -> None:
    directory = saved(llama, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Network"})
    sign = canary(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}})
    )
    assert load_model("tiny", str(directory), progress=quiet).info.architecture == "LlamaForCausalLM"
    assert not sign.exists()


def test_code_named_by_auto_map_never_runs_where_the_type_is_unknown(saved: Callable[..., Path]) -> None:
    directory = saved(llama, model_type="brand_new", auto_map={"AutoConfig": "code.Config"})
    sign = canary(directory)
    with pytest.raises(ModelError, match="'brand_new' is not one of transformers .* brings its own code"):
        load_model("tiny", str(directory), progress=quiet)
    assert not sign.exists()


def test_missing_weights_are_named(saved: Callable[..., Path]) -> None:
    directory = saved(llama, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"lacks weights: model\.layers\.3"):
        load_model("tiny", str(directory), progress=quiet)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "falcon"}, "does not dispatch its attention"),
        ({"model_type": "mamba"}, "convolution or state space"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "quantised weights"),
        ({"model_type": "gemma3", "vision_config": {}}, "multimodal"),
        ({}, "is not a Hugging Face model directory"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_before_weights_are_read(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ModelError, match=reason):
        load_model("tiny", str(tmp_path), progress=quiet)


def test_broken_files_are_told_from_missing_ones(saved: Callable[..., Path]) -> None:
    directory = saved()
    (directory / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model("tiny", str(directory), progress=quiet)
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        load_model("tiny", str(directory), progress=quiet)


def test_a_directory_without_tokenizer_is_refused(saved: Callable[..., Path]) -> None:
    directory = saved()
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_model("tiny", str(directory), progress=quiet)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "missing.gguf", "justaname", "a/b/c"])
def test_a_source_that_is_nothing_known_lists_what_it_may_be(source: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory, GGUF file, hub id .* or demo model"):
        load_model("x", source, cache_dir=tmp_path, progress=quiet)


def test_a_hub_id_that_cannot_be_reached_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("models.source.snapshot_download", unreachable)
    with pytest.raises(ModelError, match="owner/name could not be fetched from the hub: no route"):
        load_model("x", "owner/name", cache_dir=tmp_path, progress=quiet)
    with pytest.raises(ModelError, match="on the hub only"):
        load_model("x", "owner/name", cache_dir=tmp_path, fetch_source="packages", progress=quiet)


def test_a_hub_snapshot_is_asked_for_without_pickles_or_code(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(directory)

    directory = saved()
    monkeypatch.setattr("models.source.snapshot_download", snapshot)
    assert load_model("x", "owner/name", progress=quiet).info.source == "owner/name"
    assert asked["repo_id"] == "owner/name"
    assert not any(p.endswith((".bin", ".pt", ".py")) for p in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("option", "told"), [({"dtype": "int3"}, "dtype 'int3'"), ({"device": "abacus"}, "device")]
)
def test_an_unknown_dtype_or_device_is_refused(option: dict[str, str], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        load_model("x", "anything", progress=quiet, **option)


def test_sentence_transformers_files_give_pooling_prompts_and_notes(saved: Callable[..., Path]) -> None:
    directory = saved(bert)
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    modules = [{"type": f"st.models.{k}", "path": p} for k, p in zip(kinds, paths, strict=True)]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    (directory / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "query: ", "document": ""}})
    )
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128}))
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    info = load_model("tiny", str(directory), progress=quiet).info
    assert info.pooling == "cls" and info.prompts == {"query": "query: "} and info.license == "mit"
    assert any("Dense is not applied" in note for note in info.notes)
    assert any("up to 128 tokens" in note for note in info.notes)
