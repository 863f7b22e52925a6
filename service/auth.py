"""The optional API key: every route demands it but those named public here. Deny by default."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from service.errors import ApiError
from service.settings import Settings

PUBLIC_PATHS = frozenset({"/", "/livez", "/readyz", "/health", "/version", "/docs", "/openapi.json"})

Headers = Iterable[tuple[bytes, bytes]]


class KeyCheck:
    """Compares digests in constant time, so neither length nor prefix of the key shows in the timing."""

    def __init__(self, settings: Settings) -> None:
        key = settings.api_key
        self._digest = _digest(key.get_secret_value().encode("ascii")) if key is not None else None
        self._public = PUBLIC_PATHS | ({"/metrics"} if settings.metrics_public else set())

    def check(self, path: str, headers: Headers) -> None:
        """``path`` is the routed path itself: what a Host header says plays no part. ApiError 401."""
        if self._digest is None or path in self._public:
            return
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._digest):
            raise ApiError(
                "invalid_api_key", "This server needs an API key: send 'Authorization: Bearer KEY'."
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
