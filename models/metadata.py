"""What a model directory says about its use beside its weights: limits, pooling, prompts, end tokens,
licence."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.contract import ModelError

Pooling = Literal["mean", "cls", "last"]

_POOLING_MODES: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class Metadata:
    """sentence-transformers' side files, the generation config and the model card, as far as they are
    there."""

    pooling: Pooling | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    max_seq_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    license: str | None = None
    notes: tuple[str, ...] = ()


def read_json(path: Path) -> Any:
    """The JSON in ``path``, {} where there is no such file. ModelError where it is not JSON."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error


def read_metadata(directory: Path) -> Metadata:
    pooling, notes = _pooling(directory)
    length = read_json(directory / "sentence_bert_config.json").get("max_seq_length")
    prompts = read_json(directory / "config_sentence_transformers.json").get("prompts") or {}
    return Metadata(
        pooling=pooling,
        prompts={str(name): str(prefix) for name, prefix in prompts.items() if prefix},
        max_seq_length=length if isinstance(length, int) and length > 0 else None,
        eos_token_ids=_ids(read_json(directory / "generation_config.json").get("eos_token_id")),
        license=_license(directory / "README.md"),
        notes=notes,
    )


def _pooling(directory: Path) -> tuple[Pooling | None, tuple[str, ...]]:
    """Pooling mode named by the sentence-transformers modules, and notes on modules that are not applied."""
    modules = read_json(directory / "modules.json") or []
    kinds = {str(m.get("type", "")).rpartition(".")[2]: str(m.get("path", "")) for m in modules}
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    notes = tuple(f"sentence-transformers module {kind} is not applied" for kind in unknown)
    config = read_json(directory / (kinds.get("Pooling") or "1_Pooling") / "config.json")
    chosen = [mode for key, mode in _POOLING_MODES.items() if config.get(key)]
    others = [
        key
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on and key not in _POOLING_MODES
    ]
    if config.get("pooling_mode") in ("mean", "cls", "lasttoken") and not chosen:
        chosen = [_POOLING_MODES[_long_name(config["pooling_mode"])]]
    if len(chosen) != 1 or others:
        told = chosen + others
        return None, (
            *notes,
            f"its pooling ({', '.join(told)}) is not one of mean, cls, last",
        ) if told else notes
    return chosen[0], notes


def _long_name(mode: str) -> str:
    return {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}.get(
        mode, "pooling_mode_lasttoken"
    )


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int))


def _license(card: Path) -> str | None:
    """The licence named in the front matter of a model card."""
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace")[:4000]
    found = re.search(r"^license:\s*([^\s#]+)", head, re.MULTILINE) if head.startswith("---") else None
    return found.group(1).strip("\"'") if found else None
