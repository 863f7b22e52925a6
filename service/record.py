"""What is known about one HTTP request, filled in as it passes through, read once at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

OPERATIONS = {
    "/v1/encode": "encode",
    "/v1/generate": "generate",
    "/v1/score": "score",
    "/v1/compare": "compare",
    "/v1/diagnose": "diagnose",
    "/v1/embeddings": "embeddings",
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
}
"""path -> the operation label of metrics."""
OF_NO_ATTENTION = frozenset({"compare", "diagnose"})
"""Operations that run under several attentions, or look at attention itself: none speaks for the request."""


@dataclass
class Record:
    """``model`` is "unknown" until it is one of the served ones, ``attention`` "none" until it is
    validated."""

    request_id: str
    method: str
    path: str
    started: float
    status: int = 0
    error_code: str | None = None
    error_stage: str | None = None
    streaming: bool = False
    disconnected: bool = False
    model: str = "unknown"
    attention: str = "none"
    density: float | None = None
    impl: str = ""
    measured_error: float | None = None
    input_tokens: int = 0
    length_tokens: int | None = None
    """Of the document, where ``input_tokens`` counts it once for every reading."""
    output_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float = 0.0
    tokenize_s: float = 0.0
    inference_s: float = 0.0
    computed: bool = False
    extra_headers: dict[str, str] = field(default_factory=dict)

    @property
    def operation(self) -> str | None:
        return OPERATIONS.get(self.path) if self.method == "POST" else None

    @property
    def told_attention(self) -> str:
        """As metrics, headers and the access log have it."""
        return "none" if self.operation in OF_NO_ATTENTION else self.attention

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """The headers that every response carries. Times in whole milliseconds, as load scripts for other
        servers expect; ``server-timing`` has the decimals."""
        queue_ms, tokenize_ms, infer_ms = self.queue_s * 1e3, self.tokenize_s * 1e3, self.inference_s * 1e3
        total_ms = (now - self.started) * 1e3
        values = {
            "x-request-id": self.request_id,
            "server-timing": f"queue;dur={queue_ms:.1f}, tokenize;dur={tokenize_ms:.1f}, "
            f"infer;dur={infer_ms:.1f}, total;dur={total_ms:.1f}",
            "x-compute-tokens": str(self.input_tokens - self.cached_tokens + self.output_tokens),
            "x-queue-time": f"{queue_ms:.0f}",
            "x-inference-time": f"{infer_ms:.0f}",
            "x-total-time": f"{total_ms:.0f}",
            "x-attention-backend": self.told_attention,
        }
        if self.density is not None and self.told_attention != "none":
            values["x-attention-density"] = f"{self.density:.6g}"
        values.update(self.extra_headers)
        return [(name.encode("ascii"), value.encode("ascii")) for name, value in values.items()]
