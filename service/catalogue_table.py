"""The demo models as ``longreach models`` shows them and ``longreach fetch`` fetches them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from models.catalogue import DEMO_MODELS, PROFILES
from models.fetch import fetch, fetched
from models.files import default_cache_dir
from service.loading import say
from service.settings import ConfigError, Settings


def rows(cache_dir: Path) -> list[tuple[str, str, str, str, str]]:
    """(name, download, here, licence, summary) of every demo model."""
    table = []
    for model in DEMO_MODELS.values():
        found = fetched(model, cache_dir)
        here = f"yes, from {found.origin}" if found is not None else "no"
        table.append((model.name, f"{model.download_bytes / 1e6:.0f} MB", here, model.license, model.summary))
    return table


def profiles() -> str:
    return "; ".join(f"{name}: {', '.join(models)}" for name, models in PROFILES.items())


def fetch_all(names: Sequence[str], settings: Settings) -> None:
    """Fetch the named demo models, or those of the profile."""
    wanted: Iterable[str] = names or PROFILES[settings.profile]
    for name in wanted:
        if name not in DEMO_MODELS:
            raise ConfigError(f"there is no demo model {name!r}; known: {', '.join(DEMO_MODELS)}")
    for name in wanted:
        fetch(DEMO_MODELS[name], settings.cache_dir or default_cache_dir(), settings.source, say)
