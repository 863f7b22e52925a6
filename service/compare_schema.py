"""POST /v1/compare: what is asked, and what is told."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from service.answers import AttentionUsed, MemoryStats, Usage
from service.attention import MAX_SPECS
from service.attention_schema import AttentionSpec, documented_spec
from service.problems import Problem
from service.schemas import NO_SALT, ModelName, OneInput, Priority, Salt, Strict, TimeoutMs, Truncate


class AttentionSpecs(AttentionSpec):
    """Specs to compare. ``service.compare`` checks the list and parses each."""

    @classmethod
    def documented(cls) -> Any:
        several: Any = list.__class_getitem__(documented_spec())
        return Annotated[several, Field(min_length=1, max_length=MAX_SPECS)]


class CompareRequest(Strict):
    """One document under several attentions. ``exact`` always runs first, whether asked for or not."""

    model: ModelName | None = Field(None, description="may be left out where one model alone is served")
    input: OneInput
    attention: AttentionSpecs = Field(description=f"1 to {MAX_SPECS} specs, each as on the other routes")
    verify: Any = Field(
        None,
        description="how the error of those is measured that do not say so themselves: true, false, or an "
        "object with rows and layers; left out, it is true where the model can be measured",
    )
    timing: bool = Field(
        True,
        description="read the document once more under each attention, unverified and as generate would, to "
        "time it: about half of the comparison's time",
    )
    truncate: Truncate = "error"
    priority: Priority = 0
    timeout_ms: TimeoutMs | None = None
    cache_salt: Salt | None = Field(None, description=NO_SALT)


class Compared(BaseModel):
    """One attention's figures. What does not apply to the model, or was not measured, is null."""

    requested: str = Field(description="the backend that was asked for")
    attention: AttentionUsed | None = Field(None, description="as in other answers; null with an error")
    error: Problem | None = Field(
        None, description="why this one could not be run: it has no figures, the others have"
    )
    perplexity: float | None = Field(None, description="language models: of all tokens but the first")
    perplexity_change: float | None = Field(None, description="perplexity / exact's - 1, token by token")
    perplexity_change_se: float | None = Field(
        None, description="its standard error, over blocks of 64 tokens; null where there is one block"
    )
    perplexity_missing: str | None = Field(None, description="why a language model has no perplexity here")
    next_token_agreement: float | None = Field(
        None, description="language models: share of the sampled rows whose likeliest next token is exact's"
    )
    kl: float | None = Field(
        None, description="language models: mean of KL(exact || this) over the sampled rows, in nats"
    )
    sampled_rows: int | None = Field(
        None,
        description="rows of those two: at most 256, evenly spaced, always the last, which generate goes on "
        "from",
    )
    cosine: float | None = Field(None, description="encoders: of the pooled vector with exact's")
    token_vector_error: float | None = Field(
        None, description="encoders: |difference from exact| / |exact|, over all token vectors"
    )
    prefill_ms: float | None = Field(
        None, description="reading the document, unverified, from its first step on"
    )
    time_to_first_token_ms: float | None = Field(
        None,
        description="tokenising and reading, in a server that has nothing else waiting; null of encoders",
    )
    speedup: float | None = Field(None, description="exact's prefill_ms / this one's")
    memory: MemoryStats | None = None
    warnings: list[str] = []


class CompareStats(BaseModel):
    readings: int = Field(description="how often the document was read")
    tokenize_ms: float
    queue_ms: float = Field(description="waiting before first steps, summed over the readings")
    total_ms: float


class CompareAnswer(BaseModel):
    id: str
    model: str
    tokens: int = Field(description="of the document, after any truncation")
    truncated_tokens: int
    reference: Compared = Field(description="exact's own figures")
    results: list[Compared] = Field(description="in the order asked")
    usage: Usage
    stats: CompareStats
