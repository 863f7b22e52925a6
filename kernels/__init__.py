"""The attention methods of Longreach: mathematics only, no models, HTTP, files or environment.

Importing this package is cheap on purpose: ``transformers`` probes a top-level package of this name
(Hugging Face's ``kernels``), so torch and the backends load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.api import attend, attend_packed, backend_names, describe
    from kernels.contract import Unsupported

__all__ = ["Unsupported", "attend", "attend_packed", "backend_names", "describe"]

_HOME = {
    "attend": "kernels.api",
    "attend_packed": "kernels.api",
    "backend_names": "kernels.api",
    "describe": "kernels.api",
    "Unsupported": "kernels.contract",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
