"""The only list of backends: name -> module path, as strings, so that listing them imports nothing."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from kernels.contract import Backend

BACKENDS: dict[str, str] = {
    "exact": "kernels.attention.exact",
    "window": "kernels.attention.window",
    "sinks": "kernels.attention.sinks",
    "strided": "kernels.attention.strided",
    "fixed": "kernels.attention.fixed",
    "star": "kernels.attention.star",
    "random": "kernels.attention.random",
    "bigbird": "kernels.attention.bigbird",
    "xattention": "kernels.attention.xattention",
    "pooled": "kernels.attention.pooled",
    "topk": "kernels.attention.topk",
    "pages": "kernels.attention.pages",
    "vertical_slash": "kernels.attention.vertical_slash",
    "lsh": "kernels.attention.lsh",
    "kmeans": "kernels.attention.kmeans",
    "scatterbrain": "kernels.attention.scatterbrain",
    "performer": "kernels.attention.performer",
    "nystrom": "kernels.attention.nystrom",
    "sbm": "kernels.attention.sbm",
}


class UnknownBackend(KeyError):
    """No backend of that name; ``known`` lists those there are."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known = tuple(BACKENDS)
        super().__init__(f"unknown attention backend {name!r}; known: {', '.join(self.known)}")

    def __str__(self) -> str:
        return str(self.args[0])


@cache
def load(name: str) -> Backend:
    """The backend of that name, its module imported on first use."""
    if name not in BACKENDS:
        raise UnknownBackend(name)
    backend: Backend = import_module(BACKENDS[name]).BACKEND
    if backend.name != name:
        raise AssertionError(
            f"{BACKENDS[name]} registers as {backend.name!r}, the registry says {name!r}. This is a bug."
        )
    return backend
