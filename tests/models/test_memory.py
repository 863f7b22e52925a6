"""Memory: the cache to the byte, the prediction near what a fresh process really takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from kernels import peak
from models.contract import Choice
from models.kv_cache import Cache, LayerShape
from models.memory import MEASURED_FROM_TOKENS, mlp_blocks, watch_step
from tests.models.tiny import FAMILIES, bert, choice, llama, network, serve

MEASURE = """
import json, sys
import torch, transformers as hf
from tests.models.tiny import choice
from models.contract import ModelInfo, Slice
from models.network import build_network
from models.runner import Model
from models.seam import NAME, register

kind, tokens, want = sys.argv[1], int(sys.argv[2]), sys.argv[3]
wanted = choice(sys.argv[4], **json.loads(sys.argv[5]))
register()
wide = dict(vocab_size=8000, hidden_size=512, intermediate_size=1408, num_attention_heads=8,
            num_hidden_layers=3, max_position_embeddings=20000, attn_implementation=NAME)
if kind == "llama":
    made = hf.LlamaForCausalLM(hf.LlamaConfig(**wide, num_key_value_heads=2))
else:
    made = hf.BertModel(hf.BertConfig(**wide), add_pooling_layer=False)
network = build_network(made.eval().requires_grad_(False), 20000)
info = ModelInfo("x", "x", None, "", (), 20000, "", "", network.plan.causal, 3, (), {}, 512, 1)
model = Model(network, info, None)
ids = torch.randint(3, 8000, (tokens,)).tolist()
def read(n):
    targets = ids[:n] if want == "scores" else ()
    return model.step([Slice(model.open(n), ids[:n], wanted, want, n, targets)]).peak_bytes
read(64)
found = [read(tokens) for _ in range(int(sys.argv[6]))]
measured = None if None in found else max(found)
print(json.dumps({"measured": measured, "estimated": model.estimate_bytes(tokens, 0, wanted, tokens)}))
"""


def in_fresh_process(*arguments: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, timeout=200, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the high-water mark is read from Linux's /proc"
)
@pytest.mark.parametrize(
    ("kind", "want", "most"),
    [("llama", "nothing", 1.35), ("llama", "scores", 1.35), ("bert", "hidden", 1.25)],
)
def test_the_estimate_is_near_the_measured_high_water_mark(kind: str, want: str, most: float) -> None:
    found = in_fresh_process(kind, "4096", want, "exact", "{}", "1")
    if found["measured"] is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 0.65 < found["estimated"] / found["measured"] < most, found


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the high-water mark is read from Linux's /proc"
)
@pytest.mark.parametrize(
    ("kind", "backend", "params"),
    [
        ("bert", "random", {"num_random": 256, "block_size": 1}),
        ("llama", "bigbird", {"num_random": 1024, "block_size": 128}),
        ("llama", "pages", {"budget": 512, "remainder": "mean"}),
    ],
)
def test_the_estimate_knows_the_attention_that_was_chosen(
    kind: str, backend: str, params: dict[str, int]
) -> None:
    twice = "2"  # drawn keys are kept from their second use
    found = in_fresh_process(kind, "4096", "nothing", backend, json.dumps(params), twice)
    if found["measured"] is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 0.65 < found["estimated"] / found["measured"] < 1.35, found


def test_drawn_keys_are_predicted_layer_by_layer_up_to_the_limit_of_their_cache() -> None:
    encoder = serve(network(bert))
    plain = encoder.estimate_bytes(1000, 0, choice(), 1000)
    few, many, most = (
        encoder.estimate_bytes(1000, 0, choice("random", num_random=n), 1000) - plain for n in (15, 31, 127)
    )
    per_draw = 2 * 6 * 1000 * 5  # 2 layers, 6 heads, 1,000 rows; int32 and a mark
    assert many - few >= 16 * per_draw and most - many >= 96 * per_draw
    huge = encoder.estimate_bytes(10**6, 0, choice("random", num_random=256), 10**6)
    kept = 2 * 6 * 10**6 * 257 * 5
    assert huge - encoder.estimate_bytes(10**6, 0, choice(), 10**6) < kept / 10, "the cache is bounded"


def test_block_summaries_are_predicted_with_the_cache_they_stay_beside() -> None:
    decoder = serve(network(llama), 512)
    plain, pages = choice(), choice("pages", query_tile=128, block_size=32)
    one_block = 3 * 2 * 4 * 8 * 4  # 3 layers, 2 key heads, two bounds and two means of 8 numbers

    def growth(wanted: Choice) -> int:
        few, many = (decoder.estimate_bytes(320, new_tokens, wanted, 128) for new_tokens in (1, 64))
        return many - few

    assert growth(pages) == growth(plain) + 2 * one_block


@pytest.mark.parametrize("backend", ["lsh", "kmeans", "sbm"])
def test_kept_states_are_predicted_with_the_cache_they_stay_beside(backend: str) -> None:
    """Codes and sums of every key: they grow with each new token."""
    decoder = serve(network(llama), 512)

    def growth(wanted: Choice) -> int:
        few, many = (decoder.estimate_bytes(320, new_tokens, wanted, 128) for new_tokens in (1, 65))
        return many - few

    assert growth(choice(backend)) >= growth(choice()) + 64 * 3 * 2 * 2  # 3 layers, 2 key heads, int16


def test_a_models_own_windows_do_not_depend_on_the_choice() -> None:
    mistral = serve(network(FAMILIES["mistral, all layers local"]))
    assert mistral.estimate_bytes(60, 0, choice(), 60) == mistral.estimate_bytes(60, 0, choice("random"), 60)


def test_a_request_that_generates_wants_the_logits_of_one_row() -> None:
    decoder = serve(network(llama), 256)
    assert decoder.estimate_bytes(200, 1, choice(), 200) < decoder.estimate_bytes(200, 0, choice(), 200)


def test_a_chunk_bounds_a_decoders_activations_and_not_an_encoders() -> None:
    decoder, encoder = serve(network(llama), 256), serve(network(bert))
    whole, chunked = (decoder.estimate_bytes(200, 10, choice(), chunk) for chunk in (200, 20))
    assert chunked < whole
    assert encoder.estimate_bytes(60, 0, choice(), 10) == encoder.estimate_bytes(60, 0, choice(), 60)


def test_the_estimate_grows_with_every_new_token_by_its_cache() -> None:
    decoder = serve(network(llama), 256)
    one, two = (decoder.estimate_bytes(50, new, choice(), 50) for new in (1, 2))
    assert two - one == 3 * 2 * 2 * 8 * 4


def test_small_steps_are_not_measured() -> None:
    assert watch_step(torch.device("cpu"), MEASURED_FROM_TOKENS - 1)() is None


def test_a_machine_without_proc_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "_CLEAR_REFS", peak.Path("/nowhere/clear_refs"))
    assert watch_step(torch.device("cpu"), 4096)() is None
    monkeypatch.setattr(peak, "_STATUS", peak.Path("/nowhere/status"))
    assert peak._status() is None


def test_a_cache_gives_back_what_was_written_as_views() -> None:
    shapes = [LayerShape(2, 8, 8), LayerShape(1, 4, 6)]
    cache = Cache(shapes, 10, torch.float32, torch.device("cpu"))
    assert cache.held_bytes == 0
    k, v = torch.randn(1, 7, 4), torch.randn(1, 7, 6)
    cache.write(1, 0, k[:, :5], v[:, :5])
    cache.write(1, 5, k[:, 5:], v[:, 5:])
    keys, values = cache.keys_values(1, 7)
    assert torch.equal(keys[0], k) and torch.equal(values[0], v)
    assert keys.data_ptr() == cache.keys_values(1, 3)[0].data_ptr(), "views, not copies"
    assert cache.held_bytes == 7 * 10 * 4, "what was written, not the capacity"
    cache.write(0, 0, torch.ones(2, 10, 8), torch.ones(2, 10, 8))
    cache.write(1, 7, k[:, :3], v[:, :3])
    assert cache.held_bytes == 10 * (2 * 16 + 10) * 4
    cache.write(1, 0, k[:, :1], v[:, :1])
    assert cache.held_bytes == 10 * (2 * 16 + 10) * 4, "writing again over what is there takes nothing back"


def test_a_cache_keeps_the_summaries_of_its_blocks_and_counts_them() -> None:
    cache = Cache([LayerShape(2, 8, 8)], 200, torch.float32, torch.device("cpu"))
    k, v = torch.randn(2, 160, 8), torch.randn(2, 160, 8)
    cache.write(0, 0, k, v)
    before = cache.held_bytes
    kept = cache.summaries(0)
    kept.get(k, v, 32, 5)
    assert cache.summaries(0) is kept and cache.held_bytes == before + 5 * 2 * 4 * 8 * 4
    cache.close()
    assert cache.held_bytes == 0


def test_writing_again_over_a_block_makes_its_summary_anew() -> None:
    """A step that failed after some layers is followed by other tokens at the same positions."""
    cache = Cache([LayerShape(1, 4, 4)] * 2, 200, torch.float32, torch.device("cpu"))
    k, v = torch.randn(1, 128, 4), torch.randn(1, 128, 4)
    for layer in (0, 1):
        cache.write(layer, 0, k, v)
        cache.summaries(layer).get(k, v, 32, 4)
    other = torch.randn(1, 60, 4)
    cache.write(0, 68, other, other)
    keys, values = (x[0] for x in cache.keys_values(0, 128))
    found = cache.summaries(0).get(keys, values, 32, 4)
    assert torch.equal(found.kmax[:, 2:], torch.stack([keys[:, 64:96].amax(1), keys[:, 96:].amax(1)], 1))
    assert torch.equal(cache.summaries(1).get(k, v, 32, 4).kmax[:, 3], k[:, 96:].amax(1)), "another layer"


def test_a_closed_cache_holds_nothing_and_takes_nothing() -> None:
    cache = Cache([LayerShape(1, 4, 4)], 3, torch.float32, torch.device("cpu"))
    cache.write(0, 0, torch.ones(1, 1, 4), torch.ones(1, 1, 4))
    cache.close()
    assert cache.held_bytes == 0
    with pytest.raises(RuntimeError, match="closed"):
        cache.write(0, 0, torch.ones(1, 1, 4), torch.ones(1, 1, 4))


def test_an_mlp_with_a_gate_holds_three_blocks_at_once_and_a_plain_one_two() -> None:
    gated, plain = network(llama), network(bert)
    assert mlp_blocks(gated, gated.config.intermediate_size) == 3
    assert mlp_blocks(plain, plain.config.intermediate_size) == 2
