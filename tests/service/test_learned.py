"""Backends through HTTP on tiny networks with weights: one that carries parameters for ``sbm`` and one that
does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from safetensors.torch import save_file

from kernels.registry import BACKENDS, load
from models.loader import load_model
from service.app import create_app
from tests.models.tiny import bert, cluster_tensors, llama, network, tokenizer_files
from tests.service.conftest import make_settings

TEXT = "A long document about trade, treaties and tariffs. " * 4
SBM = {"backend": "sbm", "seed": 3}


def quiet(_: str) -> None:
    return None


def saved(directory: Path, make: Callable[[], Any], num_layers: int, *, carries: bool) -> Any:
    network(make).save_pretrained(directory)
    tokenizer_files(directory)
    if carries:
        save_file(cluster_tensors(num_layers), directory / "sbm.safetensors")
    return load_model(directory.name, str(directory), progress=quiet)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """``dec`` and ``enc`` carry parameters, ``plain`` is a decoder without."""
    root = tmp_path_factory.mktemp("models")

    def long_llama() -> Any:
        return llama(max_position_embeddings=512)

    models = {
        "dec": saved(root / "dec", long_llama, 3, carries=True),
        "enc": saved(root / "enc", bert, 2, carries=True),
        "plain": saved(root / "plain", long_llama, 3, carries=False),
    }
    with TestClient(create_app(make_settings(prefill_chunk_tokens=128), models)) as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def encode(client: TestClient, attention: Any, model: str = "enc", text: str = TEXT) -> dict[str, Any]:
    return post(client, "/v1/encode", model=model, input=text, attention=attention)


def generate(client: TestClient, attention: Any, model: str = "dec") -> dict[str, Any]:
    body = {"prompt": TEXT, "max_new_tokens": 12, "logprobs": 1, "attention": attention}
    return post(client, "/v1/generate", model=model, **body)


def essence(answer: dict[str, Any]) -> Any:
    """What the model computed, and what it says of its attention."""
    data = answer.get("data") or answer["choices"]
    return data, answer["attention"]


def check_heads(attention: dict[str, Any], num_layers: int) -> None:
    heads = attention["density_per_head"]
    assert len(heads) == len(attention["applied_layers"]) == num_layers
    assert all(len(layer) == 6 and all(0 <= density <= 1 for density in layer) for layer in heads)
    mean = sum(sum(layer) for layer in heads) / (6 * num_layers)
    assert mean == pytest.approx(attention["density"]) and 0 < mean < 1
    assert len({density for layer in heads for density in layer}) > 1


def test_an_encoder_with_its_parameters_encodes_and_tells_the_density_of_each_head(
    client: TestClient,
) -> None:
    answer = encode(client, SBM)
    used = answer["attention"]
    assert used["used"] == "sbm" and used["fallback_reason"] is None and used["flops_ratio"] > 0
    check_heads(used, 2)
    assert encode(client, "exact")["attention"]["density_per_head"] is None
    assert encode(client, "exact")["data"] != answer["data"]


def test_a_decoder_with_its_parameters_generates_in_chunks_and_steps(client: TestClient) -> None:
    answer = generate(client, SBM)
    assert answer["usage"]["completion_tokens"] == 12
    check_heads(answer["attention"], 3)
    split = generate(client, {"prefill": SBM, "decode": "exact"})["attention"]
    check_heads(split, 3)
    assert split["decode"]["density_per_head"] is None and split["decode"]["density"] == 1


def test_scores_are_those_of_the_seed_and_a_stream_says_the_same(client: TestClient) -> None:
    def score(seed: int) -> Any:
        body = {"model": "dec", "input": TEXT, "attention": {"backend": "sbm", "seed": seed}}
        return post(client, "/v1/score", **body)["data"][0]["perplexity"]

    assert score(1) == score(1) != score(2)
    body = {"model": "dec", "prompt": TEXT, "max_new_tokens": 12, "attention": SBM, "stream": True}
    streamed = client.post("/v1/generate", json=body)
    assert streamed.status_code == 200 and '"sbm"' in streamed.text


RANDOM = [name for name in BACKENDS if load(name).capabilities.random]
SMALL: dict[str, dict[str, Any]] = {
    "random": {"num_random": 4},
    "bigbird": {"window": 4, "global_tokens": 2, "num_random": 4, "block_size": 1},
    "performer": {"num_features": 16, "centre_keys": 16},
    "scatterbrain": {"num_features": 16, "centre_keys": 16, "support_params": {"window": 16, "sinks": 2}},
    "lsh": {"num_buckets": 8, "cluster_size": 16, "window": 4, "sinks": 2, "centre_keys": 16},
    "kmeans": {"num_clusters": 4, "cluster_size": 16, "window": 4, "sinks": 2, "train_keys": 32},
}


@pytest.mark.parametrize("backend", RANDOM)
def test_the_requests_seed_reaches_attention(client: TestClient, backend: str) -> None:
    def spec(seed: int) -> dict[str, Any]:
        return {"backend": backend, "params": SMALL.get(backend, {}), "seed": seed}

    one, same, other = (essence(encode(client, spec(seed))) for seed in (1, 1, 2))
    assert one == same and one[0] != other[0]


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Distance of two embeddings."""
    return math.dist(one["data"][0]["embedding"], other["data"][0]["embedding"])


def test_requests_with_other_seeds_beside_it_change_nothing(client: TestClient) -> None:
    """Rounding differs with what shares a step and moves an edge now and then; another seed moves most."""
    specs = [{"backend": "sbm", "seed": seed} for seed in (1, 2, 3)]
    alone = [encode(client, spec, "dec") for spec in specs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda spec: encode(client, spec, "dec"), specs * 2))
    for number, answer in enumerate(together):
        same, others = alone[number % 3], (alone[(number + 1) % 3], alone[(number + 2) % 3])
        assert 5 * apart(answer, same) < min(apart(answer, other) for other in others)


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions"])
def test_a_model_without_the_parameters_refuses_and_says_what_it_would_have_to_carry(
    client: TestClient, path: str
) -> None:
    key = "max_new_tokens" if path == "/v1/generate" else "max_tokens"
    refused = client.post(path, json={"model": "plain", "prompt": "a", key: 1, "attention": "sbm"})
    assert refused.status_code == 400 and refused.json()["code"] == "attention_not_supported"
    assert "needs parameters of its own, which 'plain' does not carry" in refused.json()["detail"]
    assert "sbm.safetensors beside its weights" in refused.json()["detail"]
    assert "layers.0.clusters" in refused.json()["limits"]["reasons"][0]


def test_a_permitted_fallback_runs_exact_and_tells_why(client: TestClient) -> None:
    used = generate(client, SBM | {"fallback": "exact"}, model="plain")["attention"]
    assert used["requested"] == "sbm" and used["used"] == "exact" and used["density"] == 1
    assert "sbm.safetensors" in used["fallback_reason"] and used["density_per_head"] is None


def test_a_model_lists_the_backend_only_where_it_carries_its_parameters(client: TestClient) -> None:
    cards = {name: client.get(f"/v1/models/{name}").json() for name in ("dec", "enc", "plain")}
    assert "sbm" in cards["dec"]["backends"] and "sbm" in cards["enc"]["backends"]
    assert "sbm" not in cards["plain"]["backends"]
    carried = sum(tensor.numel() for tensor in cluster_tensors(3).values())
    assert cards["dec"]["num_parameters"] == cards["plain"]["num_parameters"] + carried
    (row,) = (
        row
        for card in client.get("/v1/attention/backends").json()["data"]
        if card["name"] == "sbm"
        for row in card["models"]
        if row["model"] == "plain"
    )
    assert row["compatible"] is False and "sbm.safetensors" in row["reasons"][0]


APPROXIMATES = [name for name in BACKENDS if load(name).capabilities.approximates]


@pytest.mark.parametrize("backend", APPROXIMATES)
def test_a_backend_that_approximates_tells_what_it_cost_and_what_it_kept(
    client: TestClient, backend: str
) -> None:
    params = SMALL.get(backend, {"num_landmarks": 8} if backend == "nystrom" else {})
    answer = encode(client, {"backend": backend, "params": params})
    used = answer["attention"]
    assert 0 <= used["density"] < 1 and used["flops_ratio"] > 0 and used["used"] == backend
    assert client.get("/metrics").status_code == 200


def test_params_that_hold_mappings_share_a_step_by_their_values(client: TestClient) -> None:
    params = [{"support_params": {"window": 16, "sinks": 2}}, {"support_params": {"sinks": 2, "window": 16}}]
    specs = [{"backend": "scatterbrain", "params": p | {"num_features": 16}, "seed": 4} for p in params]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda spec: encode(client, spec), specs * 2))
    for answer in answers:
        assert apart(answer, answers[0]) < 1e-5
        assert answer["attention"]["params"]["support_params"] == params[0]["support_params"]
