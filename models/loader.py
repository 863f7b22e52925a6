"""From a name, path or hub id to a model ready to serve.

Weights are safetensors or GGUF, never pickle; code in a repository is never run. Before a model serves
anybody its attention is probed (``models.plan``) and checked in numbers against transformers' own
(``models.self_test``).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from models.contract import ModelError, ModelInfo, ServedModel, Task
from models.fetch import FetchSource
from models.files import default_cache_dir
from models.learned import FILES, notes, num_parameters, read_learned
from models.metadata import Metadata, read_json, read_metadata
from models.network import Network, build_network
from models.plan import refuse_class, refuse_config
from models.rotary import LENGTH_DEPENDENT, is_length_dependent, replace_rotary
from models.runner import Model
from models.seam import NAME, register
from models.self_test import self_test
from models.source import Progress, Source, resolve
from models.tokenizer import TextTokenizer, load_tokenizer

__all__ = ["default_cache_dir", "load_model"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_model(
    name: str,
    source: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    cache_dir: Path | None = None,
    fetch_source: FetchSource = "auto",
    progress: Progress = print,
) -> ServedModel:
    """Load a model to serve under ``name``.

    ``source`` is a demo model's name (``models.catalogue``), a directory with config.json and safetensors, a
    GGUF file, or a hub id. Raises ModelError with the reason and the way out.
    """
    _check_place(device, dtype)
    register()
    with _quiet():
        found = resolve(source, cache_dir or default_cache_dir(), fetch_source, progress)
        progress(f"{name}: loading from {found.directory}")
        network = _load_network(found.directory, DTYPES[dtype], device)
        metadata = read_metadata(found.directory)
        tokenizer = load_tokenizer(found.directory)
        max_tokens = _max_tokens(network, metadata)
        progress(f"{name}: checking its attention")
        offset = self_test(network, max_tokens)
        max_tokens -= offset
        replace_rotary(network)
        built = build_network(network, max_tokens, offset)
        learned = read_learned(found.directory, built.plan, DTYPES[dtype], device)
        built = replace(built, learned=learned)
    info = _info(name, source, found, network, built, metadata, tokenizer, max_tokens, device, dtype)
    return Model(built, info, tokenizer)


def _check_place(device: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not known; use cpu or cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda' was asked for and torch sees no CUDA device; use device 'cpu'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars and notes stay off while loading: what matters is raised or reported
    here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_network(directory: Path, dtype: torch.dtype, device: str) -> Any:
    config = _read_config(directory)
    refuse_config(config)
    _require_safetensors(directory)
    auto, network_class = _choose_class(config)
    refuse_class(network_class)
    options: dict[str, Any] = {"add_pooling_layer": False} if _has_pooler(network_class) else {}
    try:
        network, report = auto.from_pretrained(
            str(directory),
            config=config,
            dtype=dtype,
            attn_implementation=NAME,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise ModelError(f"{directory} cannot be loaded: {error}") from error
    _require_complete(directory, report)
    return network.to(device).eval().requires_grad_(False)


def _read_config(directory: Path) -> Any:
    """The configuration, of a class that transformers itself has. Code named by ``auto_map`` is never looked
    at."""
    raw = read_json(directory / "config.json")
    model_type = raw.get("model_type")
    if not raw:
        raise ModelError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    if model_type not in CONFIG_MAPPING:
        code = " (it brings its own code, which is never run)" if raw.get("auto_map") else ""
        raise ModelError(
            f"model type {model_type!r} is not one of transformers {transformers.__version__}{code}"
        )
    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{directory / 'config.json'} cannot be read: {error}") from error
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{directory} holds quantised weights; only plain safetensors and GGUF are served")
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if getattr(config, name, False):
            setattr(config, name, False)
    return config


def _require_safetensors(directory: Path) -> None:
    if any(path.name not in FILES.values() for path in directory.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory} holds only pickled weights ({pickles[0]}), which can run code when read. "
            "Save them as safetensors: model.save_pretrained(directory)"
        )
    raise ModelError(f"{directory} holds no *.safetensors")


def _choose_class(config: Any) -> tuple[Any, type]:
    """A causal language model where the checkpoint says it is one, else the bare network."""
    named = set(getattr(config, "architectures", None) or ())
    causal = _mapped(MODEL_FOR_CAUSAL_LM_MAPPING, config)
    bare = _mapped(MODEL_MAPPING, config)
    if causal is not None and (
        causal.__name__ in named or (not named and getattr(causal, "is_causal", False))
    ):
        return AutoModelForCausalLM, causal
    if bare is not None:
        return AutoModel, bare
    raise ModelError(
        f"model type {config.model_type!r} is neither a causal language model nor a text encoder"
    )


def _mapped(mapping: Any, config: Any) -> type | None:
    found = mapping.get(type(config), None)
    chosen: type | None = found[0] if isinstance(found, tuple) else found
    return chosen


def _has_pooler(network_class: type) -> bool:
    return "add_pooling_layer" in inspect.signature(network_class).parameters


def _require_complete(directory: Path, report: dict[str, Any]) -> None:
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError(
            f"{directory} lacks weights: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"
        )
    if report["mismatched_keys"]:
        raise ModelError(f"{directory} has weights of another shape: {sorted(report['mismatched_keys'])[:3]}")


def _max_tokens(network: Any, metadata: Metadata) -> int:
    """Positions the network can tell apart; with length-dependent rotary positions what its authors state."""
    config = network.config
    limit = int(getattr(config, "max_position_embeddings", 0) or 0)
    if not limit:
        raise ModelError(f"the config of {config.model_type!r} states no max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    if is_length_dependent(network) and rope.get("rope_type") in LENGTH_DEPENDENT - {"longrope"}:
        return max(limit, metadata.max_seq_length or int(limit * float(rope.get("factor") or 1.0)))
    return limit


def _info(
    name: str,
    source: str,
    found: Source,
    network: Any,
    built: Network,
    metadata: Metadata,
    tokenizer: TextTokenizer,
    max_tokens: int,
    device: str,
    dtype: str,
) -> ModelInfo:
    config, plan = network.config, built.plan
    told = [*found.notes, *metadata.notes, *notes(built.learned)]
    if metadata.max_seq_length is not None and metadata.max_seq_length < max_tokens:
        told.append(f"its authors used up to {metadata.max_seq_length} tokens (sentence_bert_config.json)")
    if is_length_dependent(built.body):
        told.append("rotary frequencies depend on each sequence's own length")
    return ModelInfo(
        name=name,
        source=source,
        revision=found.revision,
        architecture=type(network).__name__,
        tasks=_tasks(built),
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
        causal=plan.causal,
        num_layers=len(plan.layers),
        applied_layers=plan.applied_layers,
        local_layers=plan.local_layers,
        embedding_dim=built.sizes.hidden_size,
        num_parameters=sum(p.numel() for p in network.parameters()) + num_parameters(built.learned),
        pooling=metadata.pooling or ("last" if plan.causal else "mean"),
        prompts=found.prompts or metadata.prompts,
        special_token_ids=tokenizer.special_token_ids,
        eos_token_ids=_eos(config, metadata, tokenizer) if built.head is not None else (),
        license=metadata.license or found.license,
        notes=tuple(told),
    )


def _tasks(built: Network) -> tuple[Task, ...]:
    if built.head is not None and built.plan.causal:
        return ("generate", "score", "encode")
    return ("encode",)


def _eos(config: Any, metadata: Metadata, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Every id that ends a text, by the generation config, the config or the tokenizer."""
    named = config.eos_token_id
    ids = [*metadata.eos_token_ids, *(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return tuple(sorted({i for i in ids if isinstance(i, int)}))
