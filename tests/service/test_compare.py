"""POST /v1/compare and ``longreach compare``: one document under several attentions."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from models.contract import Slice
from service.attention import exact_choice
from service.cli import main
from service.cli_compare import LADDER, parse_spec
from service.compare_figures import (
    BLOCK_TOKENS,
    MAX_SAMPLED_ROWS,
    Divergence,
    Reference,
    cosine,
    perplexity,
    perplexity_change,
    sampled_rows,
    vector_error,
)
from service.compare_schema import Compared
from service.compare_sequences import ComparedScores
from service.settings import ConfigError
from tests.service.conftest import Blocker, Served, in_process, sample, serving, wait_for
from tests.service.fake_model import FakeModel, decoder, encoder

FIGURES = ("perplexity", "perplexity_change", "perplexity_change_se", "kl", "next_token_agreement")
TEXT = "the whale is a spouting fish with a horizontal tail; " * 6
SPECS: list[Any] = [
    {"backend": "window", "params": {"window": 64}},
    "exact",
    {"backend": "sinks", "params": {"window": 128}},
]


def ask(client: TestClient, **changes: Any) -> dict[str, Any]:
    response = client.post("/v1/compare", json={"model": "dec", "input": TEXT, "attention": SPECS, **changes})
    assert response.status_code == 200, response.text
    return dict(response.json())


def refused(client: TestClient, **changes: Any) -> dict[str, Any]:
    body = {"model": "dec", "input": TEXT, "attention": SPECS, **changes}
    response = client.post("/v1/compare", json=body)
    assert response.status_code >= 400, response.text
    return dict(response.json())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


class TestFigures:
    def test_sampled_rows_are_even_and_end_with_the_last(self) -> None:
        for tokens in (1, 2, 255, 256, 257, 300, 511, 512, 4097, 100_003):
            rows = sampled_rows(tokens)
            gaps = {b - a for a, b in zip(rows, rows[1:], strict=False)}
            assert len(rows) == min(tokens, MAX_SAMPLED_ROWS) and rows[-1] == tokens - 1
            assert rows == sorted(set(rows)) and rows[0] >= 0
            assert not gaps or max(gaps) - min(gaps) <= 1

    def test_the_change_of_perplexity_is_the_ratio_of_both_less_one(self) -> None:
        for seed in range(5):
            draws = random.Random(seed)
            exact = [-draws.expovariate(0.4) for _ in range(500)]
            scores = [score + draws.gauss(-0.02, 0.3) for score in exact]
            change = perplexity_change(scores, exact)
            both = perplexity(scores), perplexity(exact)
            assert change is not None and both[0] is not None and both[1] is not None
            assert change.relative == pytest.approx(both[0] / both[1] - 1, rel=1e-9)

    def test_its_standard_error_covers_the_truth_though_neighbours_err_together(self) -> None:
        """Differences of +-0.5 shared by runs of 16 tokens, mean 0: a token-wise error would be 4 times too
        small and miss the truth most of the time."""
        covered = 0
        for seed in range(200):
            draws = random.Random(seed)
            runs = [draws.choice((-0.5, 0.5)) for _ in range(160)]
            differences = [run for run in runs for _ in range(16)][:2550]
            change = perplexity_change([-2.0 - d for d in differences], [-2.0] * len(differences))
            assert change is not None and change.standard_error is not None
            covered += abs(change.relative) < 1.96 * change.standard_error + 0.0008  # e^x - 1 is not x
        assert 180 <= covered <= 200

    def test_one_block_has_no_standard_error(self) -> None:
        for tokens, has in ((1, False), (BLOCK_TOKENS, False), (BLOCK_TOKENS + 1, True)):
            change = perplexity_change([-1.0] * tokens, [-2.0] * tokens)
            assert change is not None and (change.standard_error is not None) == has
            assert change.relative == pytest.approx(math.exp(-1) - 1)

    def test_what_no_number_holds_is_none(self) -> None:
        assert perplexity([-800.0, -800.0]) is None
        assert perplexity_change([-800.0, -800.0], [-1.0, -1.0]) is None

    @pytest.mark.parametrize("seed", range(4))
    def test_kl_and_agreement_do_not_depend_on_how_rows_come(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        exact, used = (torch.randn(70, 33, generator=draw) * 4 for _ in range(2))
        p, q = exact.double().softmax(-1), used.double().softmax(-1)
        kl = float((p * (p / q).log()).sum(-1).mean())
        agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
        for sizes in ([70], [1, 0, 33, 36], [35, 35]):
            reference = Reference(70)
            for part in torch.split(exact, sizes):
                reference.add(part)
            divergence = Divergence(reference)
            for part in torch.split(used, sizes):
                divergence.add(part)
            assert divergence.kl == pytest.approx(kl, rel=1e-5) and divergence.agreement == agreement

    def test_the_same_predictions_diverge_by_nothing_and_others_never_by_less(self) -> None:
        logits = torch.randn(50, 64) * 30
        reference = Reference(50)
        reference.add(logits)
        same, shifted = Divergence(reference), Divergence(reference)
        same.add(logits)
        shifted.add(logits + 1000.0)  # softmax does not see it
        assert 0 <= same.kl < 1e-6 and same.agreement == 1.0
        assert 0 <= shifted.kl < 1e-3 and shifted.agreement == 1.0

    def test_vectors_are_compared_by_angle_and_by_distance(self) -> None:
        exact = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        assert cosine(exact[0], 7 * exact[0]) == pytest.approx(1)
        assert cosine(exact[0], exact[1]) == pytest.approx(0)
        assert vector_error(exact, exact) == 0
        assert vector_error(exact * 1.1, exact) == pytest.approx(0.1)
        assert vector_error(exact, torch.zeros(2, 2)) is None


class TestPredictions:
    def test_results_come_in_the_order_asked_each_with_its_figures(self, client: TestClient) -> None:
        answer = ask(client)
        assert [found["requested"] for found in answer["results"]] == ["window", "exact", "sinks"]
        for found in answer["results"]:
            assert found["error"] is None and found["attention"]["used"] == found["requested"]
            assert found["sampled_rows"] == 256 and 0 <= found["next_token_agreement"] <= 1
            assert found["prefill_ms"] >= 0 and found["memory"]["exact_bytes"] > 0
            assert found["time_to_first_token_ms"] >= found["prefill_ms"]
            assert found["cosine"] is None and found["token_vector_error"] is None

    @pytest.mark.parametrize("index", [0, 2])
    def test_perplexity_is_that_of_score_under_the_same_attention(
        self, client: TestClient, index: int
    ) -> None:
        answer = ask(client)
        scored = {}
        for spec in ("exact", SPECS[index]):
            body = {"model": "dec", "input": TEXT, "attention": spec}
            scored[json.dumps(spec)] = client.post("/v1/score", json=body).json()["data"][0]
        exact, own = scored['"exact"'], scored[json.dumps(SPECS[index])]
        found = answer["results"][index]
        assert answer["reference"]["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-9)
        assert found["perplexity"] == pytest.approx(own["perplexity"], rel=1e-9)
        change = own["perplexity"] / exact["perplexity"] - 1
        assert found["perplexity_change"] == pytest.approx(change, rel=1e-6, abs=1e-9)
        assert found["perplexity_change_se"] > 0

    def test_kl_is_that_of_the_distributions_at_the_sampled_rows(self) -> None:
        """Worked out again from the rows that the model itself gave, whatever the chunks were."""
        kept: dict[str, dict[int, Tensor]] = {"exact": {}, "window": {}}
        model = _noting(decoder(), kept)
        text = "x" * 700  # 701 tokens with the first, special one
        with in_process(model, prefill_chunk_tokens=128) as client:
            found = ask(client, input=text, attention=["window"], timing=False)["results"][0]
        assert sorted(kept["exact"]) == sorted(kept["window"]) == sampled_rows(701)
        exact, used = (torch.stack([kept[name][row] for row in sampled_rows(701)]) for name in kept)
        p, q = exact.double().softmax(-1), used.double().softmax(-1)
        assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
        agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
        assert found["next_token_agreement"] == pytest.approx(agreement)

    def test_chunks_change_no_figure(self) -> None:
        told = []
        for chunk in (128, 512):
            with in_process(decoder(), prefill_chunk_tokens=chunk) as client:
                answer = ask(client, input="abcdefg " * 90, timing=False, verify=False)
                told.append([[found[name] for name in FIGURES] for found in answer["results"]])
        for one, other in zip(*told, strict=True):
            assert one == pytest.approx(other, rel=1e-6)

    def test_exact_is_the_reference_and_is_not_run_twice(self) -> None:
        model = decoder()
        with in_process(model) as client:
            answer = ask(client, attention=["exact", "exact"], timing=False)
        assert answer["results"] == [answer["reference"]] * 2
        assert answer["stats"]["readings"] == 1 and len(model.steps) == 1
        same = answer["reference"]
        assert (same["kl"], same["next_token_agreement"], same["perplexity_change"]) == (0, 1, 0)
        assert same["perplexity_change_se"] == 0

    def test_exact_runs_first_though_nobody_asked(self) -> None:
        seen: list[str] = []
        with in_process(decoder(on_step=_names_into(seen))) as client:
            answer = ask(client, attention=["sinks", "window"])
        assert seen == ["exact", "exact", "sinks", "sinks", "window", "window"]
        assert answer["reference"]["attention"]["used"] == "exact" and answer["reference"]["speedup"] == 1

    def test_nothing_is_taken_from_the_cache_nor_left_there(self) -> None:
        model = decoder()
        with in_process(model) as client:
            generate = {"model": "dec", "prompt": TEXT, "max_new_tokens": 1}
            for _ in range(2):
                again = client.post("/v1/generate", json=generate).json()
            assert again["usage"]["cached_tokens"] > 0
            held = model.cache_use().cached_bytes
            answer = ask(client)
            assert model.cache_use().cached_bytes == held
        tokens = answer["tokens"]
        assert answer["usage"]["cached_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 6 * tokens
        assert sum(n for step in model.steps for n, _ in step) >= 6 * tokens

    def test_every_error_is_measured_unless_told_otherwise(self, client: TestClient) -> None:
        specs = [
            "window",
            {"backend": "sinks", "verify": False},
            {"backend": "sinks", "verify": {"rows": "all"}},
        ]
        for verify, expected in ((None, (True, False, True)), (False, (False, False, True))):
            answer = ask(client, attention=specs, verify=verify)
            measured = [found["attention"]["measured_error"] for found in answer["results"]]
            assert tuple(each is not None for each in measured) == expected
            assert all(each["layers"] for each in measured if each is not None)
            assert measured[2]["rows"] == measured[2]["rows_total"]
        assert answer["reference"]["attention"]["measured_error"] is None

    def test_rows_of_all_can_be_asked_for_at_once(self, client: TestClient) -> None:
        answer = ask(client, attention=["window"], verify={"rows": "all"})
        found = answer["results"][0]["attention"]["measured_error"]
        assert found["rows"] == found["rows_total"] > 0
        assert answer["reference"]["attention"]["measured_error"]["estimate"] == 0

    def test_timed_readings_are_not_verified_and_want_one_rows_logits(self) -> None:
        wants: list[tuple[str, bool]] = []

        def note(slices: Sequence[Slice]) -> None:
            wants.extend((part.want, part.meter is not None) for part in slices)

        with in_process(decoder(on_step=note), verify_fraction=1.0) as client:
            ask(client, attention=["window"], verify=True)
        timed = ("logits", False)
        assert wants == [("scores", False), timed, ("scores", True), timed]  # exact has nothing to measure

    def test_without_timing_the_document_is_read_once_for_each(self, client: TestClient) -> None:
        answer = ask(client, timing=False)
        assert answer["stats"]["readings"] == 3
        for found in [answer["reference"], *answer["results"]]:
            assert found["prefill_ms"] is found["time_to_first_token_ms"] is found["speedup"] is None
            assert found["memory"]["estimated_bytes"] > 0

    def test_a_backend_that_looks_at_the_whole_prompt_has_no_perplexity(self, client: TestClient) -> None:
        prompt_selecting = _prompt_selecting()
        found = ask(client, attention=[prompt_selecting])["results"][0]
        assert found["perplexity"] is None and found["perplexity_change"] is None
        assert "whole prompt" in found["perplexity_missing"]
        assert found["kl"] > 0 and found["attention"]["measured_error"] is not None

    def test_a_document_as_long_as_the_context_can_be_compared(self, client: TestClient) -> None:
        answer = ask(client, input={"token_ids": [65 + i % 26 for i in range(1024)]}, attention=["window"])
        assert answer["tokens"] == 1024 and answer["results"][0]["error"] is None

    def test_nothing_is_cut_unless_asked_and_what_is_cut_is_counted(self, client: TestClient) -> None:
        ids = {"token_ids": [65 + i % 26 for i in range(1100)]}
        assert refused(client, input=ids)["code"] == "context_length_exceeded"
        answer = ask(client, input=ids, attention=["window"], truncate="end", timing=False)
        assert (answer["tokens"], answer["truncated_tokens"]) == (1024, 76)

    def test_two_tokens_can_be_compared_and_one_cannot(self, client: TestClient) -> None:
        found = ask(client, input={"token_ids": [65, 66]}, attention=["window"])["results"][0]
        assert found["sampled_rows"] == 2 and found["perplexity_change_se"] is None
        problem = refused(client, input={"token_ids": [65]})
        assert problem["status"] == 400 and problem["param"] == "input"


class TestVectors:
    def test_an_encoder_is_compared_by_its_vectors(self, client: TestClient) -> None:
        answer = ask(client, model="enc", attention=["exact", "window"])
        same, found = answer["results"]
        assert same["cosine"] == pytest.approx(1) and same["token_vector_error"] == 0
        vectors = {}
        for name in ("exact", "window"):
            body = {"model": "enc", "input": TEXT, "attention": name, "normalize": False}
            encoded = client.post("/v1/encode", json=body).json()["data"][0]["embedding"]
            none = client.post("/v1/encode", json={**body, "pooling": "none"}).json()["data"][0]["embedding"]
            vectors[name] = torch.tensor(encoded), torch.tensor(none)
        (pooled, hidden), (exact_pooled, exact_hidden) = vectors["window"], vectors["exact"]
        expected = torch.nn.functional.cosine_similarity(pooled, exact_pooled, dim=0)
        assert found["cosine"] == pytest.approx(float(expected), abs=1e-5)
        distance = float((hidden - exact_hidden).norm() / exact_hidden.norm())
        assert found["token_vector_error"] == pytest.approx(distance, rel=1e-4)

    def test_an_encoder_has_a_reading_time_and_no_first_token(self, client: TestClient) -> None:
        found = ask(client, model="enc", attention=["window"])["results"][0]
        assert found["prefill_ms"] >= 0 and found["time_to_first_token_ms"] is None
        assert found["perplexity"] is None and found["perplexity_missing"] is None and found["kl"] is None
        assert found["attention"]["measured_error"]["estimate"] > 0


class TestFailures:
    def test_what_the_model_cannot_run_has_an_error_and_the_others_go_on(self, client: TestClient) -> None:
        answer = ask(client, model="enc", attention=["strided", "window"])
        failed, fine = answer["results"]
        assert failed["error"]["code"] == "attention_not_supported" and failed["attention"] is None
        assert failed["error"]["param"] == "attention[0]" and failed["cosine"] is None
        assert "for no reason" in failed["error"]["detail"] and fine["error"] is None

    def test_a_permitted_fallback_has_exacts_figures(self, client: TestClient) -> None:
        spec = {"backend": "strided", "fallback": "exact"}
        found = ask(client, model="enc", attention=[spec])["results"][0]
        assert found["requested"] == found["attention"]["requested"] == "strided"
        assert found["attention"]["used"] == "exact" and found["attention"]["fallback_reason"]
        assert found["token_vector_error"] == 0

    def test_a_step_that_fails_fails_its_choice_alone(self) -> None:
        def fail(slices: Sequence[Slice]) -> None:
            if slices[0].choice.backend == "window":
                raise RuntimeError("secret prompt text")

        with in_process(decoder(on_step=fail)) as client:
            answer = ask(client)
        assert [r["error"] and r["error"]["code"] for r in answer["results"]] == [
            "internal_error",
            None,
            None,
        ]
        assert "secret" not in json.dumps(answer)

    def test_without_exact_there_is_nothing_to_compare_with(self) -> None:
        def fail(slices: Sequence[Slice]) -> None:
            raise RuntimeError("no")

        with in_process(decoder(on_step=fail)) as client:
            assert refused(client)["code"] == "internal_error"

    def test_numbers_that_overflow_are_an_error(self) -> None:
        with in_process(decoder(nan=ord("w"))) as client:
            assert refused(client)["code"] == "non_finite_output"

    def test_a_model_that_cannot_be_measured_is_compared_all_the_same(self) -> None:
        model = decoder(applied_layers=())
        with in_process(model) as client:
            found = ask(client, attention=["window"])["results"][0]
            assert found["attention"]["measured_error"] is None
            assert any("cannot be measured" in warning for warning in found["warnings"])
            problem = refused(client, attention=["window"], verify=True)
            assert problem["status"] == 400 and problem["param"] == "verify"

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"attention": []}, "attention"),
            ({"attention": "window"}, "attention"),
            ({"attention": ["exact"] * 33}, "attention"),
            ({"attention": ["exact", "nothing"]}, "attention[1]"),
            (
                {"attention": ["exact", {"backend": "window", "params": {"window": -1}}]},
                "attention[1].params.window",
            ),
            ({"attention": [{"prefill": "exact", "decode": "window"}]}, "attention[0]"),
            (
                {"attention": [{"backend": "window", "verify": {"layers": [99]}}]},
                "attention[0].verify.layers",
            ),
            ({"verify": 7}, "verify"),
            ({"verify": {"rows": 3}}, "verify.rows"),
            ({"verify": {"layers": [99]}}, "verify.layers"),
            ({"input": ""}, "input"),
            ({"input": ["a", "b"]}, "input"),
            ({"input": "x" * 5000}, "input"),
            ({"timing": "yes"}, "timing"),
            ({"max_new_tokens": 3}, "max_new_tokens"),
            ({"model": "none"}, "model"),
        ],
    )
    def test_what_makes_no_sense_is_refused_by_name_before_anything_runs(
        self, changes: dict[str, Any], param: str
    ) -> None:
        model = decoder()
        with in_process(model) as client:
            problem = refused(client, **changes)
        assert problem["status"] in (400, 404) and str(problem["param"]).startswith(param)
        assert not model.steps

    def test_more_memory_than_there_is_fails_the_choice_that_needs_it(self) -> None:
        text = "x" * 900
        with in_process(
            decoder(), memory_limit_bytes=940_000 + 901 * 1000, prefill_chunk_tokens=128
        ) as client:
            plain = ask(client, input=text, attention=["window"], timing=False, verify=False)
        assert plain["results"][0]["error"] is None
        kept = 256 * 259 * 4
        with in_process(decoder(), memory_limit_bytes=901 * 1000 + kept // 2) as client:
            assert refused(client, input=text)["code"] == "never_fits_memory"

    def test_a_deadline_ends_the_whole_comparison(self) -> None:
        blocker = Blocker()
        with in_process(decoder(on_step=blocker)) as client:
            problem = refused(client, timeout_ms=100)
            blocker.release.set()
        assert problem["code"] == "deadline_exceeded" and problem["status"] == 504


class TestCounts:
    def test_a_comparison_is_counted_once_and_under_no_attention(self, client: TestClient) -> None:
        def counted(text: str, name: str, **more: str) -> float:
            return sample(text, f"longreach_{name}", model="dec", operation="compare", **more) or 0

        before, series = client.get("/metrics").text, _series(client)
        answer = ask(client)
        text = client.get("/metrics").text
        assert _series(client) == series and answer["usage"]["prompt_tokens"] > 512 >= answer["tokens"]
        for name in ("queue_seconds_count", "tokenize_seconds_count", "input_tokens_count"):
            assert counted(text, name) - counted(before, name) == 1, name
        read = counted(text, "input_tokens_sum") - counted(before, "input_tokens_sum")
        assert read == answer["usage"]["prompt_tokens"] == answer["tokens"] * answer["stats"]["readings"]
        told = {"attention": "none", "code": "200"}
        assert counted(text, "requests_total", **told) - counted(before, "requests_total", **told) == 1

    def test_one_that_fails_midway_leaves_no_series_and_no_header_of_an_attention(self) -> None:
        def fail(slices: Sequence[Slice]) -> None:
            if any(part.choice.backend == "window" for part in slices):
                blocker(slices)

        blocker = Blocker()
        with in_process(decoder(on_step=fail)) as client:
            before = _series(client)
            body = {"model": "dec", "input": TEXT, "attention": SPECS, "timeout_ms": 500}
            response = client.post("/v1/compare", json=body)
            blocker.release.set()
            assert response.status_code == 504 and blocker.entered.is_set()
            assert response.headers["x-attention-backend"] == "none"
            assert "x-attention-density" not in response.headers
            assert _series(client) == before


def test_the_openapi_file_documents_every_spec_and_their_number(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    attention = schemas["CompareRequest"]["properties"]["attention"]
    assert (attention["minItems"], attention["maxItems"]) == (1, 32)
    assert "WindowAttention" in json.dumps(attention["items"])
    assert set(schemas["Compared"]["properties"]) == set(Compared.model_fields)


class TestAmongOthers:
    def test_short_requests_are_answered_while_a_document_is_compared(self) -> None:
        blocker = Blocker()

        def block(slices: Sequence[Slice]) -> None:
            if any(part.choice.backend == "sinks" for part in slices):
                blocker(slices)

        with serving(decoder(on_step=block), encoder()) as served, ThreadPoolExecutor(1) as threads:
            body = {"model": "dec", "input": TEXT, "attention": SPECS}
            comparing = threads.submit(served.post, "/v1/compare", body)
            assert blocker.entered.wait(20)
            second = served.post("/v1/compare", body)
            assert second.status_code == 429 and "retry-after" in second.headers
            assert second.json()["code"] == "queue_full"
            blocker.release.set()
            assert comparing.result(30).status_code == 200
            assert served.post("/v1/compare", body).status_code == 200

    def test_a_client_that_leaves_ends_its_comparison(self) -> None:
        blocker = Blocker()
        seen: list[str] = []
        note = _names_into(seen)

        def both(slices: Sequence[Slice]) -> None:
            note(slices)
            blocker(slices)

        with serving(decoder(on_step=both)) as served:
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(
                    served.url + "/v1/compare",
                    json={"model": "dec", "input": TEXT, "attention": SPECS},
                    timeout=httpx2.Timeout(0.5),
                )
            assert blocker.entered.wait(20)
            wait_for(lambda: not served.runtime.jobs or all(job.ended for job in served.runtime.jobs))
            blocker.release.set()
            wait_for(lambda: not served.models["dec"].open_states)
            ended = len(seen)
            assert served.post("/v1/score", {"model": "dec", "input": "abc"}).status_code == 200
        assert seen[:ended] == ["exact"]

    def test_scoring_goes_on_beside_it(self) -> None:
        with serving() as served, ThreadPoolExecutor(4) as threads:
            body = {"model": "dec", "input": TEXT, "attention": SPECS, "verify": False}
            comparing = threads.submit(served.post, "/v1/compare", body)
            scores = [
                threads.submit(served.post, "/v1/score", {"model": "dec", "input": f"{i} abc"})
                for i in range(9)
            ]
            assert {score.result(30).status_code for score in scores} == {200}
            beside = comparing.result(30).json()
            alone = served.post("/v1/compare", body).json()

        for one, other in zip(beside["results"], alone["results"], strict=True):
            assert [one[name] for name in FIGURES] == pytest.approx(
                [other[name] for name in FIGURES], rel=1e-6
            )


class TestSequence:
    def test_the_last_row_is_read_and_its_made_up_score_thrown_away(self) -> None:
        model = decoder()
        ids = [65 + i % 7 for i in range(300)]
        sequence = ComparedScores(ids, exact_choice(), sampled_rows(300), Reference(256))
        state = model.open(300)
        for size in (128, 128, 44):
            part = sequence.next_slice(state, size)
            assert len(part.targets) == len(part.token_ids) == size
            sequence.accept(model.step([part]).results[0], state.length)
        assert sequence.finished and len(sequence.scores) == 299
        state.close()


class TestCommand:
    @pytest.mark.parametrize(
        ("text", "spec"),
        [
            ("bigbird", "bigbird"),
            ("window:window=512", {"backend": "window", "params": {"window": 512}}),
            (
                "lsh:variant=smyrf, num_hash_rounds=2",
                {"backend": "lsh", "params": {"variant": "smyrf", "num_hash_rounds": 2}},
            ),
            ("xattention:mass=0.9", {"backend": "xattention", "params": {"mass": 0.9}}),
            ('{"backend": "window", "seed": 3}', {"backend": "window", "seed": 3}),
        ],
    )
    def test_specs_are_written_shortly_or_as_json(self, text: str, spec: object) -> None:
        assert parse_spec(text) == spec

    @pytest.mark.parametrize("text", ["window:", "window:512", "window:window=", "{window", "window:=3"])
    def test_a_spec_that_cannot_be_read_is_named(self, text: str) -> None:
        with pytest.raises(ConfigError, match="--attention"):
            parse_spec(text)

    def test_every_rung_of_the_default_ladder_is_a_valid_spec(self) -> None:
        from service.attention import parse

        for text in LADDER:
            parse(parse_spec(text))

    def test_the_table_has_a_line_for_each_and_no_empty_column(
        self, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = run_command(served, tmp_path, capsys, "--attention", "window:window=64", "exact", "sinks")
        lines = out.splitlines()
        assert [line.split()[0] for line in lines[:4]] == ["ATTENTION", "exact", "window:window=64", "sinks"]
        assert "COSINE" not in lines[0] and "KL" in lines[0] and "ERROR" in lines[0]
        assert "readings" in out

    def test_an_encoder_has_columns_of_its_own(
        self, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = run_command(served, tmp_path, capsys, "--attention", "window", "strided", model="enc")
        head = out.splitlines()[0]
        assert "COSINE" in head and "PERPLEXITY" not in head and "FIRST TOKEN" not in head
        assert "strided: attention backend 'strided' cannot serve" in out

    def test_without_specs_the_models_own_part_of_the_ladder_is_compared(
        self, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        answer = json.loads(run_command(served, tmp_path, capsys, "--json", "--no-timing", "--no-verify"))
        assert [found["requested"] for found in answer["results"]] == [
            text.partition(":")[0] for text in LADDER
        ]
        assert answer["reference"]["prefill_ms"] is None
        assert answer["results"][0]["attention"]["measured_error"] is None

    def test_error_against_time_can_be_drawn(
        self, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        from matplotlib.image import imread

        file = tmp_path / "error.png"
        run_command(served, tmp_path, capsys, "--attention", "window", "sinks", "--plot", str(file))
        assert imread(file).std() > 0.01

    def test_a_key_is_sent_and_its_absence_explained(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with serving(api_key="open-sesame-open-sesame") as served:
            run_command(
                served, tmp_path, capsys, "--attention", "window", "--api-key", "open-sesame-open-sesame"
            )
            told = failed_command(served.url, tmp_path, capsys, "--attention", "window")
        assert "--api-key" in told

    def test_a_server_that_is_not_there_is_told_how_to_start(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = failed_command("http://127.0.0.1:9", tmp_path, capsys, "--attention", "window")
        assert "longreach serve" in told and "--url" in told

    def test_the_servers_own_words_reach_the_terminal(
        self, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = failed_command(
            served.url, tmp_path, capsys, "--model", "dec", "--attention", "window:window=0"
        )
        assert "attention[0].params.window" in told

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--url", "localhost:8000"], "--url"),
            (["--url", "http://localhost:port", "--model", "dec"], "--url"),
            (["--timeout-s", "nan"], "--timeout-s"),
            (["--timeout-s", "inf"], "--timeout-s"),
            (["--timeout-s", "-1"], "--timeout-s"),
            (["--plot", "error.txt"], "--plot"),
            (["--plot", "nowhere/error.png"], "--plot"),
            (["--plot", "error.png", "--no-verify"], "--no-verify"),
        ],
    )
    def test_bad_options_are_named_before_anything_is_asked(
        self,
        arguments: list[str],
        named: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert named in failed_command("http://127.0.0.1:9", tmp_path, capsys, *arguments)

    def test_missing_and_foreign_files_are_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        foreign = tmp_path / "latin.txt"
        foreign.write_bytes(b"caf\xe9")
        for file, told in ((tmp_path / "none.txt", "none.txt"), (foreign, "UTF-8")):
            with pytest.raises(SystemExit) as left:
                main(["compare", str(file), "--attention", "window"])
            assert left.value.code == 2 and told in capsys.readouterr().err


def run_command(
    served: Served, home: Path, capsys: pytest.CaptureFixture[str], *arguments: str, model: str = "dec"
) -> str:
    file = home / "document.txt"
    file.write_text(TEXT, encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(["compare", str(file), "--url", served.url, "--model", model, *arguments])
    out, err = capsys.readouterr()
    assert left.value.code == 0, err
    return out


def failed_command(url: str, home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    file = home / "document.txt"
    file.write_text(TEXT, encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(["compare", str(file), "--url", url, *arguments])
    out, err = capsys.readouterr()
    assert left.value.code == 2 and not out and "Traceback" not in err
    return err


def _series(client: TestClient) -> set[str]:
    return set(re.findall(r"^longreach_[^ ]+", client.get("/metrics").text, re.MULTILINE))


def _names_into(seen: list[str]) -> Any:
    return lambda slices: seen.extend(part.choice.backend for part in slices)


def _noting(model: FakeModel, kept: dict[str, dict[int, Tensor]]) -> FakeModel:
    """``kept[backend][row]``: the logits that the model gave for it."""
    inner = model.result

    def result(slices: Sequence[Slice]) -> Any:
        starts = [part.sequence.length for part in slices]
        found = inner(slices)
        for part, start, each in zip(slices, starts, found.results, strict=True):
            rows = [] if each.row_logits is None else list(each.row_logits)
            for row, logits in zip(part.logit_rows, rows, strict=True):
                kept[part.choice.backend][start + row] = logits
        return found

    model.result = result  # type: ignore[method-assign]
    return model


def _prompt_selecting() -> str:
    from kernels.registry import BACKENDS, load

    return next(name for name in BACKENDS if load(name).capabilities.selection == "prompt")
