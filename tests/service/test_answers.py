"""What the native routes answer, member by member."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.service.conftest import in_process
from tests.service.fake_model import CLS, EOS, SEP, WIDTH, decoder, encoder

ATTENTION = {
    "requested",
    "used",
    "params",
    "applied_layers",
    "density",
    "density_computed",
    "dense_share",
    "density_per_head",
    "dropped_mass",
    "flops_ratio",
    "impl",
    "fallback_reason",
    "plan",
    "plans",
    "plan_reason",
    "plan_reasons",
    "budget",
    "measured_error",
    "decode",
}
STATS = {
    "queue_ms",
    "tokenize_ms",
    "prefill_ms",
    "decode_ms",
    "time_to_first_token_ms",
    "selection_ms",
    "attention_ms",
    "total_ms",
    "batch_size",
    "batch_tokens",
    "memory",
}
USAGE = {"prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"}


def post(client: TestClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n", 1)
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_encode_answers_with_every_member_of_the_contract(client: TestClient) -> None:
    answer = post(client, "/v1/encode", {"model": "enc", "input": "hello"})
    assert set(answer) == {"id", "model", "data", "usage", "attention", "stats"}
    assert answer["id"].startswith("enc_") and answer["model"] == "enc"
    (item,) = answer["data"]
    assert set(item) == {"index", "embedding", "tokens", "truncated_tokens", "chunks"}
    assert len(item["embedding"]) == WIDTH and item["tokens"] == 7 and item["chunks"] is None
    assert math.isclose(sum(x * x for x in item["embedding"]), 1, rel_tol=1e-5)
    assert set(answer["usage"]) == USAGE and answer["usage"]["prompt_tokens"] == 7
    assert set(answer["attention"]) == ATTENTION
    assert answer["attention"]["measured_error"] is None and answer["attention"]["density"] == 1
    assert set(answer["stats"]) == STATS
    assert set(answer["stats"]["memory"]) == {"device", "estimated_bytes", "peak_bytes", "exact_bytes"}
    assert answer["stats"]["time_to_first_token_ms"] is None


def test_stats_tell_selection_and_attention_time_summed_over_steps_and_sequences(client: TestClient) -> None:
    """The fake model reports 0.1 ms of selection and 0.2 ms of attention for each slice: the prompt, which is
    read once for both choices, and three more tokens of each."""
    body = {"prompt": "hello", "max_new_tokens": 4, "n": 2}
    stats = post(client, "/v1/generate", body)["stats"]
    assert stats["selection_ms"] == pytest.approx(0.7) and stats["attention_ms"] == pytest.approx(1.4)
    stats = post(client, "/v1/encode", {"input": ["a", "b", "c"]})["stats"]
    assert stats["selection_ms"] == pytest.approx(0.3) and stats["attention_ms"] == pytest.approx(0.6)


def test_generate_answers_with_every_member_of_the_contract(client: TestClient) -> None:
    body = {"model": "dec", "prompt": "hello", "max_new_tokens": 4, "n": 2, "logprobs": 2}
    answer = post(client, "/v1/generate", body)
    assert set(answer) == {"id", "model", "choices", "usage", "attention", "stats"}
    assert answer["id"].startswith("gen_")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length" and len(choice["text"]) == 4
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 4
    assert all(len(row) == 2 and row[0]["logprob"] >= row[1]["logprob"] for row in logprobs["top_logprobs"])
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8 and usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert answer["stats"]["time_to_first_token_ms"] <= answer["stats"]["total_ms"]


def test_score_answers_one_likelihood_per_token_after_the_first(client: TestClient) -> None:
    answer = post(client, "/v1/score", {"input": "hello"})
    (data,) = answer["data"]
    assert len(data["token_logprobs"]) == 5 == answer["usage"]["prompt_tokens"] - 1
    mean = -sum(data["token_logprobs"]) / 5
    assert math.isclose(data["perplexity"], math.exp(mean), rel_tol=1e-9)
    assert math.isclose(data["bits_per_byte"], mean / math.log(2), rel_tol=1e-9)


def test_a_stream_says_what_the_plain_answer_says(client: TestClient) -> None:
    body = {"prompt": "hello", "max_new_tokens": 9, "n": 3, "temperature": 1, "seed": 5, "logprobs": 1}
    plain = post(client, "/v1/generate", body)
    streamed = client.post("/v1/generate", json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["cache-control"] == "no-cache"
    told = events(streamed.text)
    assert [name for name, _ in told[:-1]] == ["token"] * 27 and told[-1][0] == "done"
    for choice in plain["choices"]:
        tokens = [data for name, data in told if name == "token" and data["index"] == choice["index"]]
        assert "".join(data["text"] for data in tokens) == choice["text"]
        assert [data["token_id"] for data in tokens] == choice["logprobs"]["token_ids"]
    done = told[-1][1]
    assert {"id", "model", "finish_reason", "choices", "usage", "attention", "stats"} == set(done)
    assert done["usage"] == plain["usage"] and done["finish_reason"] == "length"


def test_include_stats_false_leaves_the_stats_out(client: TestClient) -> None:
    for path, body in (
        ("/v1/encode", {"input": "a"}),
        ("/v1/generate", {"prompt": "a", "max_new_tokens": 1}),
        ("/v1/score", {"input": "ab"}),
    ):
        assert "stats" not in post(client, path, {**body, "include_stats": False})


def test_prefill_and_decode_may_have_attentions_of_their_own(client: TestClient) -> None:
    attention = {"prefill": {"backend": "window", "params": {"window": 8}}, "decode": "exact"}
    answer = post(client, "/v1/generate", {"prompt": "hello", "max_new_tokens": 3, "attention": attention})
    used = answer["attention"]
    assert used["used"] == "window" and used["params"]["window"] == 8 and used["density"] < 1
    assert used["decode"]["used"] == "exact" and used["decode"]["density"] == 1
    whole = post(client, "/v1/generate", {"prompt": "hello", "max_new_tokens": 3, "attention": "window"})
    assert (
        whole["choices"][0]["text"] != answer["choices"][0]["text"] and whole["attention"]["decode"] is None
    )


def test_a_permitted_fallback_is_used_and_told() -> None:
    with in_process() as client:
        refused = client.post("/v1/encode", json={"input": "a", "attention": "strided"})
        assert refused.status_code == 400 and refused.json()["code"] == "attention_not_supported"
        assert "for no reason" in refused.json()["detail"]
        spec = {"backend": "strided", "fallback": "exact"}
        used = post(client, "/v1/encode", {"input": "a", "attention": spec})["attention"]
        assert used["requested"] == "strided" and used["used"] == "exact" and used["density"] == 1
        assert "this fake encoder does not do strided" in used["fallback_reason"]
        answer = client.post("/v1/encode", json={"input": "a", "attention": spec})
        assert answer.headers["x-attention-backend"] == "exact"


@pytest.mark.parametrize(
    ("truncate", "kept"), [("end", [CLS, *range(0, 6), SEP]), ("start", [CLS, *range(4, 10), SEP])]
)
def test_truncation_keeps_special_tokens_and_tells_what_it_cut(truncate: str, kept: list[int]) -> None:
    model = encoder(max_tokens=8)
    seen: list[list[int]] = []
    model.on_step = lambda slices: seen.extend(list(part.token_ids) for part in slices)
    with in_process(model) as client:
        text = bytes(range(10)).decode()
        refused = client.post("/v1/encode", json={"input": ["ok", text]})
        assert refused.status_code == 400
        assert refused.json()["code"] == "context_length_exceeded" and refused.json()["param"] == "input[1]"
        assert refused.json()["limits"] == {"max_tokens": 8, "tokens": 12}
        assert seen == []
        answer = post(client, "/v1/encode", {"input": text, "truncate": truncate})
        assert seen == [kept]
        assert answer["data"][0]["truncated_tokens"] == 4 and answer["data"][0]["tokens"] == 8
        assert answer["usage"]["prompt_tokens"] == 8, "usage is what was processed"


@pytest.mark.parametrize(("truncate", "kept"), [("end", b"0123"), ("start", b"6789")])
def test_truncation_keeps_the_prefix_that_input_type_asked_for(truncate: str, kept: bytes) -> None:
    model = encoder(max_tokens=9)
    seen: list[list[int]] = []
    model.on_step = lambda slices: seen.extend(list(part.token_ids) for part in slices)
    body = {"input": "0123456789", "input_type": "query", "truncate": truncate}
    with in_process(model) as client:
        (item,) = post(client, "/v1/encode", body)["data"]
        assert seen == [[CLS, *b"q: ", *kept, SEP]]
        assert item["truncated_tokens"] == 6 and item["tokens"] == 9, "only the document was cut"
        chunked = {**body, "late_chunking": {"chunk_tokens": 9}}
        (chunk,) = post(client, "/v1/encode", chunked)["data"][0]["chunks"]
        assert chunk["char_range"] == ([0, 4] if truncate == "end" else [6, 10])
    with in_process(encoder(max_tokens=5)) as client:
        refused = client.post("/v1/encode", json=body)
        assert refused.status_code == 400 and refused.json()["param"] == "input_type"
        assert refused.json()["limits"] == {"max_tokens": 5, "prefix_tokens": 4}


def test_input_type_adds_the_models_prefix_and_nothing_else_does(client: TestClient) -> None:
    plain = post(client, "/v1/encode", {"input": "q: text"})
    typed = post(client, "/v1/encode", {"input": "text", "input_type": "query"})
    bare = post(client, "/v1/encode", {"input": "text"})
    assert typed["data"][0]["embedding"] == plain["data"][0]["embedding"] != bare["data"][0]["embedding"]
    ids = {"input": {"token_ids": [1]}, "input_type": "query"}
    assert client.post("/v1/encode", json=ids).json()["param"] == "input_type"


def test_one_chunk_over_everything_is_the_documents_own_embedding(client: TestClient) -> None:
    body = {"input": "some longer text", "late_chunking": {"chunk_tokens": 1000}}
    (item,) = post(client, "/v1/encode", body)["data"]
    (chunk,) = item["chunks"]
    assert chunk["embedding"] == item["embedding"]
    assert chunk["token_range"] == [0, 18] and chunk["char_range"] == [0, 16]


def test_late_chunks_cover_the_document_with_the_overlap_asked_for(client: TestClient) -> None:
    body = {"input": "abcdefghij", "late_chunking": {"chunk_tokens": 5, "overlap": 2}}
    (item,) = post(client, "/v1/encode", body)["data"]
    assert [chunk["token_range"] for chunk in item["chunks"]] == [[0, 5], [3, 8], [6, 11], [9, 12]]
    assert item["chunks"][1]["char_range"] == [2, 7]
    vectors = post(client, "/v1/encode", {"input": "abcdefghij", "pooling": "none", "normalize": False})
    rows = vectors["data"][0]["embedding"][3:8]
    mean = [sum(column) / 5 for column in zip(*rows, strict=True)]
    norm = math.sqrt(sum(x * x for x in mean))
    assert item["chunks"][1]["embedding"] == pytest.approx([x / norm for x in mean], abs=1e-6)


def test_late_chunking_spans_are_characters_of_the_clients_text(client: TestClient) -> None:
    body = {"input": "żółw ślimak", "input_type": "query", "late_chunking": {"spans": [[0, 4], [5, 11]]}}
    (item,) = post(client, "/v1/encode", body)["data"]
    first, second = item["chunks"]
    # [CLS] and the prefix "q: " come first; ż, ó, ł and ś take two bytes each.
    assert first["token_range"] == [4, 11] and second["token_range"] == [12, 19]
    assert first["char_range"] == [0, 4] and second["char_range"] == [5, 11]


def test_dimensions_keeps_the_first_ones_and_normalises_again(client: TestClient) -> None:
    whole = post(client, "/v1/encode", {"input": "x"})["data"][0]["embedding"]
    cut = post(client, "/v1/encode", {"input": "x", "dimensions": 4})["data"][0]["embedding"]
    norm = math.sqrt(sum(x * x for x in whole[:4]))
    assert cut == pytest.approx([x / norm for x in whole[:4]], abs=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "none"])
def test_pooling_is_what_it_says(client: TestClient, pooling: str) -> None:
    body = {"input": "abc", "normalize": False}
    rows = post(client, "/v1/encode", {**body, "pooling": "none"})["data"][0]["embedding"]
    assert len(rows) == 5
    expected = {
        "mean": [sum(column) / 5 for column in zip(*rows, strict=True)],
        "cls": rows[0],
        "last": rows[-1],
        "none": rows,
    }[pooling]
    found = post(client, "/v1/encode", {**body, "pooling": pooling})["data"][0]["embedding"]
    assert found == (expected if pooling == "none" else pytest.approx(expected, abs=1e-6))


def test_a_causal_encoder_pools_the_last_token_whatever_the_chunks() -> None:
    model = decoder("both", tasks=("generate", "score", "encode"))
    with in_process(model, prefill_chunk_tokens=128) as client:
        text = "x" * 700
        last = post(client, "/v1/encode", {"input": text, "normalize": False})["data"][0]["embedding"]
        rows = post(client, "/v1/encode", {"input": text, "pooling": "none", "normalize": False})
        assert last == rows["data"][0]["embedding"][-1]
        assert max(tokens for step in model.steps for tokens, _ in step) == 128


def test_generation_ends_at_eos_without_showing_it() -> None:
    model = decoder(script=b"done")
    with in_process(model) as client:
        answer = post(client, "/v1/generate", {"prompt": "x", "max_new_tokens": 50, "logprobs": 0})
        choice = answer["choices"][0]
        assert choice["text"] == "done" and choice["finish_reason"] == "stop"
        assert choice["logprobs"]["token_ids"][-1] == EOS
        assert answer["usage"]["completion_tokens"] == 5


def test_generation_ends_before_a_stop_string_that_spans_tokens() -> None:
    model = decoder(script=b"one STO two STOP three")
    with in_process(model) as client:
        body = {"prompt": "x", "max_new_tokens": 50, "stop": ["STOP"]}
        answer = post(client, "/v1/generate", body)
        assert answer["choices"][0]["text"] == "one STO two "
        assert answer["choices"][0]["finish_reason"] == "stop"
    model = decoder(script=b"one STO two STOP three")
    with in_process(model) as client:
        told = events(client.post("/v1/generate", json={**body, "stream": True}).text)
        texts = [data["text"] for name, data in told if name == "token"]
        assert "".join(texts) == "one STO two " and not any("STOP" in text for text in texts)


def test_streamed_text_never_holds_half_a_character() -> None:
    text = "żółw 🐢 ok"
    with in_process(decoder(script=text.encode())) as client:
        body = {"prompt": "x", "max_new_tokens": 50, "stream": True}
        told = events(client.post("/v1/generate", json=body).text)
        texts = [data["text"] for name, data in told if name == "token"]
        assert "".join(texts) == text and not any("\ufffd" in part for part in texts)


def test_every_response_carries_the_common_headers(client: TestClient) -> None:
    for answer in (
        client.get("/livez"),
        client.get("/nowhere"),
        client.post("/v1/encode", json={"input": "x"}),
        client.post("/v1/encode", json={"input": 1}),
        client.post("/v1/generate", json={"prompt": "x", "stream": True, "max_new_tokens": 1}),
    ):
        for name in ("x-request-id", "server-timing", "x-compute-tokens", "x-queue-time", "x-inference-time"):
            assert name in answer.headers, name
        assert "x-total-time" in answer.headers and "x-attention-backend" in answer.headers
    answer = client.post("/v1/encode", json={"input": "x", "attention": "window"})
    assert answer.headers["x-attention-backend"] == "window"
    assert 0 < float(answer.headers["x-attention-density"]) < 1
    assert answer.headers["x-compute-tokens"] == "3"


def test_cached_tokens_are_not_counted_as_computed() -> None:
    body = {"prompt": "x" * 299, "max_new_tokens": 2}
    model = decoder()
    model.limit_cached(1 << 30)
    with in_process(model) as client:
        model.limit_cached(1 << 30)
        first, second = (client.post("/v1/generate", json=body) for _ in range(2))
    usage = [answer.json()["usage"] for answer in (first, second)]
    assert usage[0]["cached_tokens"] == 0 and usage[1]["cached_tokens"] > 0
    for answer, used in zip((first, second), usage, strict=True):
        computed = used["prompt_tokens"] - used["cached_tokens"] + used["completion_tokens"]
        assert answer.headers["x-compute-tokens"] == str(computed)


def test_a_harmless_request_id_is_echoed_and_a_harmful_one_replaced(client: TestClient) -> None:
    assert client.get("/livez", headers={"x-request-id": "a.B-1:2_3"}).headers["x-request-id"] == "a.B-1:2_3"
    for bad in (b"x" * 129, b"a b", b"\xfc", b""):
        answer = client.get("/livez", headers={b"x-request-id": bad})
        assert answer.headers["x-request-id"].startswith("req_")


def test_models_and_backends_say_what_fits_together(client: TestClient) -> None:
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    cards = {card["id"]: card for card in models["data"]}
    assert {"id", "tasks", "max_tokens", "architecture", "dtype", "limits", "backends"} <= set(cards["enc"])
    assert cards["dec"]["tasks"] == ["generate", "score"] and cards["dec"]["limits"]["max_new_tokens"] == 1023
    assert "strided" not in cards["enc"]["backends"] and "strided" in cards["dec"]["backends"]
    assert client.get("/v1/models/enc").json()["id"] == "enc"
    backends = {card["name"]: card for card in client.get("/v1/attention/backends").json()["data"]}
    assert {"exact", "window", "bigbird"} <= set(backends)
    assert backends["window"]["params_schema"]["properties"]["window"]["maximum"] == 65536
    told = {row["model"]: row for row in backends["strided"]["models"]}
    assert told["dec"] == {"model": "dec", "compatible": True, "reasons": []}
    assert told["enc"]["compatible"] is False and len(told["enc"]["reasons"]) == 2


def test_tokenize_gives_ids_and_character_spans(client: TestClient) -> None:
    answer = post(client, "/v1/tokenize", {"model": "enc", "input": ["é", "a"]})
    first, second = answer["data"]
    assert first["token_ids"] == [CLS, 0xC3, 0xA9, SEP] and first["tokens"] == 4
    assert first["char_spans"] == [[0, 0], [0, 1], [0, 1], [0, 0]]
    assert second["token_ids"] == [CLS, 97, SEP]
    bare = post(client, "/v1/tokenize", {"model": "enc", "input": "a", "special_tokens": False})
    assert bare["data"][0]["token_ids"] == [97]


def test_the_model_may_be_left_out_only_where_one_model_can_do_the_task() -> None:
    with in_process(encoder("a"), encoder("b"), decoder("c")) as client:
        assert client.post("/v1/generate", json={"prompt": "x", "max_new_tokens": 1}).status_code == 200
        refused = client.post("/v1/encode", json={"input": "x"})
        assert refused.status_code == 400 and refused.json()["param"] == "model"
        wrong = client.post("/v1/encode", json={"model": "c", "input": "x"}).json()
        assert wrong["status"] == 400 and "cannot encode" in wrong["detail"]
    with in_process(encoder("a"), decoder("c", tasks=("generate", "score", "encode"))) as client:
        assert post(client, "/v1/encode", {"input": "x"})["model"] == "a", "the encoder, not the decoder"


def test_tokenising_happens_off_the_event_loop() -> None:
    model = encoder()
    with in_process(model) as client:
        post(client, "/v1/encode", {"input": "x"})
    assert model.tokenizer.threads and all("worker" in name for name in model.tokenizer.threads)


def test_the_docs_page_fetches_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200 and "http://" not in page.text and "https://" not in page.text
    assert client.get("/", follow_redirects=False).headers["location"] == "/docs"
