"""What a request says about its turn and its cache: checked at the door, and taken to the engine."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.jobs import Job
from service.runtime import Runtime
from service.sequences import GenerateSequence
from tests.service.conftest import in_process

CALLS: dict[str, dict[str, Any]] = {
    "/v1/encode": {"model": "enc", "input": "abc"},
    "/v1/generate": {"model": "dec", "prompt": "abc", "max_new_tokens": 2},
    "/v1/score": {"model": "dec", "input": "abc"},
    "/v1/embeddings": {"model": "enc", "input": "abc"},
    "/v1/completions": {"model": "dec", "prompt": "abc", "max_tokens": 2},
    "/v1/chat/completions": {
        "model": "dec",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 2,
    },
}
TEXT_PATHS = ("/v1/generate", "/v1/completions", "/v1/chat/completions")


def submitted(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Every job that reaches the engine from now on."""
    runtime: Runtime = client.app.state.runtime  # type: ignore[attr-defined]
    jobs: list[Job] = []
    plain = runtime.engine.submit

    def submit(job: Job) -> None:
        jobs.append(job)
        plain(job)

    monkeypatch.setattr(runtime.engine, "submit", submit)
    return jobs


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("priority", [-11, 11, 10**30, 1.5, True, "3"])
def test_a_priority_out_of_bounds_or_of_another_type_is_refused(
    client: TestClient, path: str, priority: object
) -> None:
    answer = client.post(path, json={**CALLS[path], "priority": priority})
    assert answer.status_code == 400 and answer.json()["param"] == "priority", answer.text


@pytest.mark.parametrize("path", CALLS)
def test_a_priority_reaches_job_and_entry(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_process() as client:
        jobs = submitted(client, monkeypatch)
        for priority in (-10, 10):
            assert client.post(path, json={**CALLS[path], "priority": priority}).status_code == 200
        assert client.post(path, json=CALLS[path]).status_code == 200
    assert [job.priority for job in jobs] == [-10, 10, 0]
    entries = [sequence.entry for job in jobs for sequence in job.sequences]
    assert [entry.priority for entry in entries if entry is not None] == [-10, 10, 0]


@pytest.mark.parametrize("path", TEXT_PATHS)
def test_a_salt_reaches_every_prompt(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_process() as client:
        jobs = submitted(client, monkeypatch)
        for extra in ({"cache_salt": "mine", "n": 2}, {}):
            assert client.post(path, json={**CALLS[path], **extra}).status_code == 200
    salts = [sequence.prompt and sequence.prompt.salt for job in jobs for sequence in job.sequences]
    assert salts == ["mine", "mine", ""]


@pytest.mark.parametrize("path", TEXT_PATHS[1:])
def test_openais_cache_key_separates_caches_where_no_salt_is_given(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_process() as client:
        jobs = submitted(client, monkeypatch)
        asked = ({"prompt_cache_key": "key"}, {"prompt_cache_key": "key", "cache_salt": "salt"})
        for extra in (*asked, {"prompt_cache_key": None}, {"prompt_cache_key": ""}):
            answer = client.post(path, json={**CALLS[path], **extra})
            assert answer.status_code == 200 and "x-ignored-params" not in answer.headers
    assert [job.sequences[0].salt for job in jobs] == ["key", "salt", "", ""]


@pytest.mark.parametrize("path", CALLS)
def test_a_salt_is_bounded_everywhere_and_changes_no_answer(client: TestClient, path: str) -> None:
    for salt in ("", "x" * 129, 5):
        answer = client.post(path, json={**CALLS[path], "cache_salt": salt})
        assert answer.status_code == 400 and answer.json()["param"] == "cache_salt"
    body = {**CALLS[path], **({"seed": 5} if path in TEXT_PATHS else {})}
    plain, salted = (client.post(path, json={**body, **extra}).json() for extra in ({}, {"cache_salt": "s"}))
    told = "choices" if path in TEXT_PATHS else "data"
    assert plain[told] == salted[told]


def test_one_choice_of_a_prompt_leads_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_process() as client:
        jobs = submitted(client, monkeypatch)
        body = {"model": "dec", "prompt": ["ab", "cd"], "n": 3, "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
    [job] = jobs
    leaders = [s.leader for s in job.sequences if isinstance(s, GenerateSequence)]
    first, second = job.sequences[0], job.sequences[3]
    assert leaders == [None, first, first, None, second, second]
    assert job.memory.estimated_bytes == sum(s.estimated_bytes for s in job.sequences)
    assert all(s.estimated_bytes <= first.estimated_bytes for s in job.sequences)


def test_cached_tokens_are_told_where_each_api_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_process() as client:
        monkeypatch.setattr(Job, "cached_tokens", property(lambda job: 7))
        native = client.post("/v1/generate", json=CALLS["/v1/generate"]).json()["usage"]
        assert native["cached_tokens"] == 7 and "prompt_tokens_details" not in native
        for path in TEXT_PATHS[1:]:
            usage = client.post(path, json=CALLS[path]).json()["usage"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": 7}
        body = {**CALLS["/v1/completions"], "stream": True, "stream_options": {"include_usage": True}}
        assert (
            '"prompt_tokens_details": {"cached_tokens": 7}' in client.post("/v1/completions", json=body).text
        )
