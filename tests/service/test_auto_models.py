"""``auto`` over HTTP on tiny networks with weights: its guard repairs, and what it ran can be run again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loadtests.tiny_models import write_models
from models.loader import load_model
from service.app import create_app
from tests.service.conftest import make_settings
from tests.service.test_answers import post
from tests.service.test_auto import auto, given, profile, rung, runtime_of

POOLED = ("pooled", {"budget": 64, "block_size": 32})
WINDOW = ("window", {"window": 64})
TOKENS = 600
"""Two chunks of whole strata, and a rest."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The profile trusts both attentions far too much: the guard has to see what they lose."""
    directories = write_models(tmp_path_factory.mktemp("models"))
    models = {name: load_model(name, str(directories[name]), progress=lambda line: None) for name in NAMES}
    settings = make_settings(prefill_chunk_tokens=256)
    with TestClient(create_app(settings, models)) as found:
        for name in models:
            trusted = [[rung(*(POOLED if layer % 2 else WINDOW), 0.01, 0.2)] for layer in range(4)]
            runtime_of(found).profiles.put(name, profile(*trusted))
        yield found


NAMES = ("tiny-decoder", "tiny-encoder")


def ids(tokens: int = TOKENS, seed: int = 0) -> dict[str, list[int]]:
    draws = random.Random(seed)
    return {"token_ids": [draws.randrange(3, 200) for _ in range(tokens)]}


REQUESTS: list[tuple[str, dict[str, Any], str]] = [
    (
        "/v1/generate",
        {"model": "tiny-decoder", "prompt": ids(), "max_new_tokens": 5, "logprobs": 3},
        "choices",
    ),
    ("/v1/score", {"model": "tiny-decoder", "input": ids()}, "data"),
    ("/v1/encode", {"model": "tiny-decoder", "input": ids()}, "data"),
    ("/v1/encode", {"model": "tiny-encoder", "input": ids()}, "data"),
]


@pytest.mark.parametrize("max_error", [0.02, 0.1, 0.8])
@pytest.mark.parametrize(("path", "body", "made"), REQUESTS, ids=["generate", "score", "causal", "encoder"])
def test_a_budget_is_kept_and_what_ran_can_be_run_again(
    client: TestClient, path: str, body: dict[str, Any], made: str, max_error: float
) -> None:
    first = post(client, path, {**body, "attention": auto(max_error, verify={"rows": "all"})})
    told = first["attention"]
    budget, error = told["budget"], told["measured_error"]
    assert told["plan_reason"] == "chosen" and budget["within"] and budget["rows"] > 0
    assert error["estimate"] <= 1.5 * max_error, "the whole error, of all rows"
    repaired = [each["layer"] for each in told["plan"] if each["exact_from"] is not None]
    assert repaired == budget["repaired_layers"] and all(
        each["exact_from"] % 256 == 0 for each in told["plan"] if each["exact_from"] is not None
    )
    if max_error == 0.02:
        assert repaired, "half a budget of 0.02 is not kept by a window of 64"
    for each in ("window", auto(0.5), "exact"):
        post(client, path, {**body, "attention": each})
    same = post(client, path, {**body, "attention": auto(max_error)})
    again = post(client, path, {**body, "attention": given(*told["plan"])})
    assert same[made] == first[made] and same["attention"]["plan"] == told["plan"]
    assert again[made] == first[made]
    # Of a call that is repaired halfway the pairs kept before are shared out by rows.
    assert again["attention"]["density"] == pytest.approx(told["density"], abs=0.01)


def test_inputs_are_guarded_apart(client: TestClient) -> None:
    body = {"model": "tiny-encoder", "input": [ids(30), ids(), ids(300, 7)], "attention": auto(0.05)}
    together = post(client, "/v1/encode", body)
    plans = together["attention"]["plans"] or [together["attention"]["plan"]] * 3
    assert {each["backend"] for each in plans[0]} == {"exact"}
    for i, source in enumerate(body["input"]):
        alone = post(client, "/v1/encode", {**body, "input": source})
        assert alone["attention"]["plan"] == plans[i]
        assert alone["data"][0]["embedding"] == pytest.approx(together["data"][i]["embedding"], abs=1e-5)


def test_a_comparison_holds_it_against_exact(client: TestClient) -> None:
    body = {"model": "tiny-decoder", "input": ids(), "attention": [auto(0.1), auto(0.8), "exact"]}
    strict, loose, exact = post(client, "/v1/compare", body)["results"]
    assert strict["attention"]["budget"]["within"] and loose["attention"]["budget"]["within"]
    assert exact["kl"] == 0 <= strict["kl"] < loose["kl"]
    assert strict["attention"]["density"] >= loose["attention"]["density"]
