"""How attention is executed, chosen by a request: ``impl``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from models.contract import WarmUp
from service import loading
from service.app import create_app
from service.runtime import Runtime
from tests.models.tiny import llama
from tests.service.conftest import make_settings, sample
from tests.service.fake_model import decoder
from tests.service.test_learned import post, saved

PROMPT = {"token_ids": [5, 9, 3, 7, 11, 2, 8, 4, 6, 10, 12, 13]}
WINDOW = {"backend": "window", "params": {"window": 4}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root: Path = tmp_path_factory.mktemp("models")

    def network() -> Any:
        return llama(max_position_embeddings=512)

    model = saved(root / "dec", network, 3, carries=False)
    with TestClient(create_app(make_settings(prefill_chunk_tokens=128), {"dec": model})) as client:
        yield client


def generate(client: TestClient, attention: object) -> dict[str, Any]:
    body = {"model": "dec", "prompt": PROMPT, "max_new_tokens": 3, "attention": attention, "cache_salt": "x"}
    return post(client, "/v1/generate", **body)


def counted(client: TestClient, impl: str) -> float:
    told = client.get("/metrics").text
    return sample(told, "longreach_attention_impl_total", model="dec", attention="window", impl=impl)


def test_the_answer_and_a_metric_tell_which_impl_ran(client: TestClient) -> None:
    before = counted(client, "torch")
    answer = generate(client, WINDOW | {"impl": "torch"})
    assert answer["attention"]["impl"] == "torch"
    assert counted(client, "torch") == before + 1
    if not torch.cuda.is_available():
        assert generate(client, WINDOW)["attention"]["impl"] == "torch", "what suits a CPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: triton can run")
def test_an_impl_that_cannot_run_is_refused_with_the_reasons(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    asked = WINDOW | {"impl": "triton"}
    refused = client.post("/v1/generate", json={"model": "dec", "prompt": PROMPT, "attention": asked})
    told = refused.json()
    assert (refused.status_code, told["code"]) == (400, "attention_not_supported")
    assert any("CUDA device" in reason for reason in told["limits"]["reasons"])
    assert "Leave out 'impl'" in told["detail"]
    instead = generate(client, asked | {"fallback": "exact"})["attention"]
    assert instead["used"] == "exact" and "CUDA device" in instead["fallback_reason"]


def test_an_unknown_impl_is_refused_by_name(client: TestClient) -> None:
    asked = WINDOW | {"impl": "reference"}
    refused = client.post("/v1/generate", json={"model": "dec", "prompt": PROMPT, "attention": asked})
    assert refused.status_code == 400 and refused.json()["param"] == "attention.impl"
    assert "'auto', 'torch' or 'triton'" in refused.json()["detail"]


def test_triton_kernels_answer_as_torch_does(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU in Triton's interpreter: prefill, and decode steps, through the whole server."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = counted(client, "triton")
    by_triton = generate(client, WINDOW | {"impl": "triton"})
    by_torch = generate(client, WINDOW | {"impl": "torch"})
    assert by_triton["attention"]["impl"] == "triton" and by_triton["attention"]["density"] < 1
    assert by_triton["choices"][0]["text"] == by_torch["choices"][0]["text"]
    assert by_triton["attention"]["density"] == by_torch["attention"]["density"]
    assert counted(client, "triton") == before + 1


def test_kernels_are_compiled_before_the_first_request(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    model = decoder()
    runtime = Runtime(make_settings())
    runtime.add_models({model.info.name: model})

    def note() -> None:
        seen.append((runtime.progress.phase, runtime.progress.done, runtime.progress.total))

    model.to_warm = [WarmUp("exact", note), WarmUp("window", note)]
    runtime.start()
    asyncio.run(loading.warm_up(runtime, model))
    assert runtime.close()
    phase = f"compiling kernels of {model.info.name}"
    assert seen == [(f"{phase}: exact", 0, 2), (f"{phase}: window", 1, 2)]
    assert "0 kernels compiled and 0 found on disk" in capsys.readouterr().err
