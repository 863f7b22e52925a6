"""Who is measured: backends at settings, those of the default ladders or those that were asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernels.api import backend_names, parse_params
from kernels.registry import load as load_backend
from models.contract import Choice, ModelError
from models.quality_ladders import Ladders
from models.runner import Model


@dataclass(frozen=True)
class Contender:
    """One backend at one setting. ``params`` as asked for; ``full`` with every default filled in, which is
    what identifies it. ``chosen``: its dear measurement is made where it is made of some. ``brief``: it is
    measured at the usual length alone, unless asked for."""

    backend: str
    params: dict[str, Any]
    full: dict[str, Any] = field(compare=False)
    chosen: bool = False
    brief: bool = False

    @property
    def key(self) -> str:
        return key_of(self.backend, self.full)

    @property
    def label(self) -> str:
        return f"{self.backend} {setting(self.params)}"

    def choice(self, seed: int) -> Choice:
        return Choice(self.backend, parse_params(self.backend, self.full), seed)


def key_of(backend: str, full: Mapping[str, Any]) -> str:
    return f"{backend} {json.dumps(full, sort_keys=True)}"


def setting(params: Mapping[str, Any]) -> str:
    """Params as tables show them; those of a support behind its name."""
    return ", ".join(_told(params)) or "default"


def _told(params: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _told(value, f"{name}.")
        else:
            yield f"{prefix}{name}={value}"


def contender(backend: str, params: Mapping[str, Any], chosen: bool = True, brief: bool = False) -> Contender:
    """Raises UnknownBackend and InvalidParams."""
    full = parse_params(backend, params).model_dump(mode="json", exclude_none=True)
    return Contender(backend, dict(params), full, chosen, brief)


def unsuitable(causal: bool) -> dict[str, str]:
    """The registered backends that such a model does not run at any setting, or only where it carries their
    parameters, each with the reason."""
    found = {}
    for name in backend_names():
        able = load_backend(name).capabilities
        if able.learned:
            found[name] = "needs parameters of its own in the model: ask for it with `--backends`"
        elif causal and not (able.causal and able.decode):
            found[name] = "has no causal form"
        elif not causal and not able.bidirectional:
            found[name] = "has no bidirectional form"
    return found


def default_contenders(
    ladders: Ladders, causal: bool, backends: Sequence[str] | None = None
) -> list[Contender]:
    """The ladders of the backends named, or of all registered ones that such a model can run; in registry
    order."""
    named = backends or [name for name in backend_names() if name not in unsuitable(causal)]
    found = []
    for backend in sorted(named, key=backend_names().index):
        settings = ladders.settings.get(backend)
        for params in settings or ({},):
            chosen = settings is None or params in ladders.chosen.get(backend, ())
            brief = params in ladders.brief.get(backend, ())
            found.append(contender(backend, params, chosen, brief))
    return found


def contenders_of(
    ladders: Ladders, causal: bool, backends: Sequence[str] | None, text: str | None
) -> list[Contender]:
    """Those of ``text`` (--contenders) where given, else the ladders; by registry order, so that those of one
    backend are measured together."""
    if text is None:
        return default_contenders(ladders, causal, backends)
    order = backend_names().index
    return sorted(read_contenders(text), key=lambda each: order(each.backend))


def read_contenders(text: str) -> list[Contender]:
    """``{"window": [{"window": 512}], ...}`` -> contenders. ValueError where it is not of that form, or where
    a backend or its params are refused."""
    try:
        ladders = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--contenders is not JSON: {error}") from None
    if not isinstance(ladders, dict) or not all(_is_settings(each) for each in ladders.values()):
        raise ValueError('--contenders must be {"backend": [{params}, ...], ...}')
    return [contender(backend, params) for backend, settings in ladders.items() for params in settings]


def _is_settings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def refuse_cut_tiles(contenders: Sequence[Contender], chunk_tokens: int) -> None:
    """ValueError naming every contender whose query tiles would be cut by chunks of ``chunk_tokens`` rows: a
    cut tile chooses twice, which serving never does. 0, the whole text at once, cuts none."""
    tiles = {each.label: each.choice(0).params.chunk_multiple() for each in contenders}
    cut = {label: tile for label, tile in tiles.items() if chunk_tokens % tile}
    if cut:
        multiple = math.lcm(*tiles.values())
        fits = -(-chunk_tokens // multiple) * multiple
        told = ", ".join(f"{label} (tiles of {tile})" for label, tile in cut.items())
        raise ValueError(f"--chunk-tokens {chunk_tokens} cuts the query tiles of {told}: give {fits}, or 0")


def refuse_unsupported(model: Model, contenders: Sequence[Contender]) -> None:
    """ModelError naming every contender that the model cannot run, with the reasons."""
    told = [f"{each.label}: {reason}" for each in contenders for reason in model.unsupported(each.choice(0))]
    if told:
        raise ModelError("some contenders cannot run; leave them out with --contenders: " + "; ".join(told))
