"""The front door: names, descriptions, refusals, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jsonschema
import pytest
import torch

from kernels import Unsupported, api, attend, attend_packed, backend_names, describe, registry
from kernels.contract import Backend, Capabilities, Params, Segment, Workspace
from kernels.registry import UnknownBackend, load
from tests.kernels.kernel_cases import CASES, LEARNED, make_inputs
from tests.kernels.selection_oracle import SELECTING

COMMON: dict[str, Any] = {"causal": True, "scale": 0.1}
SELECTIONS = dict.fromkeys((*SELECTING, "scatterbrain"), "tile") | dict.fromkeys(
    ("performer", "lsh", "kmeans", "sbm"), "row"
)
SELECTIONS["nystrom"] = "prompt"
RANDOM = ("random", "bigbird", "performer", "scatterbrain", "lsh", "kmeans", "sbm")
APPROXIMATING = ("performer", "nystrom", "scatterbrain")


def call(**changes: Any) -> Any:
    q, k, v = make_inputs(1, (4, 2), 8, 8, 16)
    return attend(**{"q": q, "k": k, "v": v, "backend": "window", **COMMON, **changes})


@pytest.mark.parametrize("name", backend_names())
def test_a_description_is_plain_and_its_schema_accepts_its_defaults(name: str) -> None:
    told = describe(name)
    assert told["name"] == name and told["summary"] and told["paper"] and told["conditions"]
    jsonschema.Draft202012Validator.check_schema(told["params_schema"])
    jsonschema.validate(told["defaults"], told["params_schema"])
    assert told["capabilities"]["impls"] == ["reference", "torch", "triton"]
    assert told["capabilities"]["selection"] == SELECTIONS.get(name, "none")
    assert (load(name).select is not None) == (name in SELECTING and name != "vertical_slash")
    assert told["capabilities"]["random"] == (name in RANDOM)
    assert told["capabilities"]["learned"] == (name == "sbm")
    assert told["capabilities"]["approximates"] == (name in APPROXIMATING)
    assert told["capabilities"]["exact"] == (name == "exact")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_params_survive_a_round_trip_through_json_values(case: Any) -> None:
    parsed = api.parse_params(*case)
    assert api.parse_params(case[0], parsed.model_dump(mode="json")) == parsed
    assert api.parse_params(case[0], parsed) is parsed


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownBackend, match="unknown attention backend 'nope'; known: exact, window"):
        call(backend="nope")


@pytest.mark.parametrize(
    ("backend", "params", "message"),
    [
        ("window", {"window": 0}, r"window: Input should be greater than or equal to 1 \(got 0\)"),
        ("window", {"window": 65537}, r"window: .*less than or equal to 65536 \(got 65537\)"),
        ("window", {"window": 3.5}, r"window: .*integer.*\(got 3.5\)"),
        ("window", {"window": True}, r"window: .*integer"),
        ("window", {"sinks": 1}, r"sinks: no such parameter; there are: window, global_tokens"),
        ("exact", {"window": 1}, r"window: no such parameter; there are: none"),
        ("strided", {"combine": "both"}, r"combine: .*'union', 'multihead' or 'sequential' \(got 'both'\)"),
        ("strided", {"stride": 1}, r"stride: .*greater than or equal to 2"),
        ("random", {"num_random": 257}, r"num_random must lie in 1 .. 256 where block_size is 1, got 257"),
        (
            "random",
            {"num_random": 70, "block_size": 64},
            r"num_random must be a multiple of block_size \(64\)",
        ),
        ("bigbird", {"block_size": 48}, r"block_size: Input should be 1, 32, 64 or 128 \(got 48\)"),
        ("bigbird", {"num_random": 5000}, r"num_random: .*less than or equal to 4096"),
    ],
)
def test_bad_params_name_the_field_and_its_bound(backend: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(
        api.InvalidParams, match=f"params of attention backend {backend!r} are invalid: .*{message}"
    ):
        call(backend=backend, params=params)


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


HOSTILE: dict[str, Any] = {
    "long integer": 10**5000,
    "long integers": [10**5000] * 3,
    "deep": deep(100_000),
    "long text": "x" * 100_000,
    "long list": ["y" * 1000] * 10_000,
    "large mapping": {str(i): i for i in range(10_000)},
    "large mapping of long names": {f"{i}" + "z" * 1000: i for i in range(1000)},
    "mapping of long names": {f"{i}" + "z" * 10_000: i for i in range(7)},
}
SUPPORTED = {"local": "window", "topk": "mass", "bigbird": "block_size", "lsh": "num_buckets"}
"""A support of scatterbrain and one of its fields."""


@pytest.mark.parametrize("backend", ["window", "topk", "vertical_slash", "strided", "scatterbrain"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_refusal_repeats_little_of_what_was_given_whatever_it_is(backend: str, kind: str) -> None:
    for field in load(backend).params.model_fields:
        with pytest.raises(api.InvalidParams) as caught:
            api.parse_params(backend, {field: HOSTILE[kind]})
        told = str(caught.value)
        assert len(told) < 2000 if "names" in kind else len(told) < 800
        assert f"{field}: " in told or f"{field}.0zzz" in told


@pytest.mark.parametrize("support", SUPPORTED)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_refusal_of_a_support_s_params_names_the_field_and_is_as_short(support: str, kind: str) -> None:
    field = SUPPORTED[support]
    with pytest.raises(api.InvalidParams) as caught:
        given = {"support": support, "support_params": {field: HOSTILE[kind]}}
        api.parse_params("scatterbrain", given)
    assert len(str(caught.value)) < 800 and f"support_params.{field}: " in str(caught.value)


@pytest.mark.parametrize("backend", backend_names())
def test_params_of_very_many_names_are_refused_unread(backend: str) -> None:
    fields = load(backend).params.model_fields
    told = f"10,000 parameters were given, but there are only {len(fields)}: {', '.join(fields) or 'none'}"
    with pytest.raises(api.InvalidParams) as caught:
        api.parse_params(backend, HOSTILE["large mapping"])
    assert caught.value.problems == (("", told),)


def test_only_the_first_problems_are_told_and_the_others_counted() -> None:
    with pytest.raises(api.InvalidParams) as caught:
        call(params={str(i): i for i in range(7)})
    told = str(caught.value)
    assert told.count("no such parameter") == 5 and told.endswith("; and 2 more")
    assert len(caught.value.problems) == 7


def test_a_rule_over_several_params_is_told_in_its_own_words() -> None:
    with pytest.raises(api.InvalidParams) as caught:
        api.parse_params("lsh", {"num_buckets": 7})
    assert caught.value.problems == (("", "num_buckets must be 1 or even, got 7"),)
    with pytest.raises(api.InvalidParams) as caught:
        api.parse_params("scatterbrain", {"support": "lsh", "support_params": {"num_buckets": 7}})
    assert caught.value.problems == (("support_params", "num_buckets must be 1 or even, got 7"),)


def test_a_support_s_defaults_are_filled_in_so_that_what_means_the_same_is_equal() -> None:
    own = {"window": 256, "sinks": 4}
    for given in ({}, {"support_params": {}}, {"support_params": own}, {"support_params": {"window": 256}}):
        parsed = api.parse_params("scatterbrain", given)
        assert parsed == api.parse_params("scatterbrain") and parsed.model_dump()["support_params"] == own
    parsed = api.parse_params("scatterbrain", {"support": "topk", "support_params": {"mass": 0.5}})
    assert parsed.model_dump()["support_params"] == api.parse_params("topk", {"mass": 0.5}).model_dump()


@pytest.mark.parametrize(("given", "of_what"), [([64] * 1025, "layer"), ([[64] * 1025], "key head")])
def test_a_list_per_layer_or_head_has_a_greatest_length(given: list[Any], of_what: str) -> None:
    told = f"has 1,025 entries, one per {of_what}, but at most 1024 may be given"
    with pytest.raises(api.InvalidParams, match=told):
        api.parse_params("topk", {"budget": given})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"budget": given}, describe("topk", graph=False)["params_schema"])


def test_a_name_that_is_too_long_is_cut() -> None:
    with pytest.raises(api.InvalidParams, match="no such parameter") as caught:
        api.parse_params("window", {"z" * 100_000: 1})
    assert len(str(caught.value)) < 500


def test_all_bad_params_are_told_at_once() -> None:
    with pytest.raises(api.InvalidParams) as caught:
        call(params={"window": 0, "global_tokens": -1, "other": 2})
    assert [field for field, _ in caught.value.problems] == ["window", "global_tokens", "other"]


def test_params_of_another_backend_are_refused() -> None:
    with pytest.raises(api.InvalidParams, match="expected WindowParams, got SinksParams"):
        call(params=api.parse_params("sinks"))
    with pytest.raises(api.InvalidParams, match="expected a mapping, got list"):
        call(params=[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 8, 16)}, r"q must have 4 dimensions .* got \[4, 8, 16\]"),
        ({"k": torch.zeros(1, 2, 0, 16)}, r"k has an empty dimension"),
        (
            {"k": torch.zeros(1, 3, 8, 16), "v": torch.zeros(1, 3, 8, 16)},
            r"query heads \(4\) must be a multiple",
        ),
        ({"k": torch.zeros(1, 2, 9, 16)}, r"k and v must agree"),
        ({"k": torch.zeros(1, 2, 8, 12)}, r"same head_dim, got 16 and 12"),
        (
            {"k": torch.zeros(1, 2, 7, 16), "v": torch.zeros(1, 2, 7, 16)},
            r"start must lie in 0 .. M - N = -1",
        ),
        ({"start": 1}, r"start must lie in 0 .. M - N = 0 \(8 queries, 8 keys\), got 1"),
        ({"v": torch.zeros(1, 2, 8, 16, dtype=torch.float64)}, r"share one floating dtype"),
        ({"scale": float("nan")}, r"scale must be finite"),
        ({"seed": -1}, r"seed must lie in 0 .. 2\*\*63 - 1, got -1"),
        ({"layer": -1}, r"layer must be 0 or more"),
    ],
)
def test_bad_calls_say_what_was_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_an_impl_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(Unsupported, match="has no impl 'cuda', only reference, torch, triton") as caught:
        call(impl="cuda")
    assert caught.value.backend == "window" and len(caught.value.reasons) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_triton_is_refused_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    wide = torch.zeros(1, 1, 2, 300, dtype=torch.float64)
    options: dict[str, Any] = {"causal": True, "scale": 1.0}
    with pytest.raises(Unsupported) as caught:
        attend(wide, wide, wide, backend="window", impl="triton", **options)
    words = ("CUDA device", "float64", "at most 256, got 300")
    assert len(caught.value.reasons) == len(words)
    for reason, word in zip(caught.value.reasons, words, strict=True):
        assert word in reason
    told = attend(wide, wide, wide, backend="window", **options)
    assert told.stats.impl == "torch", "what suits the device"


def test_unsupported_tells_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Backend(
        name="limited",
        summary="",
        paper="",
        params=Params,
        capabilities=Capabilities(
            causal=False, bidirectional=True, decode=False, exact=False, selection="prompt"
        ),
        impls={},
        workspace=lambda params, shape: Workspace(0),
        unsupported=lambda params, causal: ["its params are odd"],
    )
    monkeypatch.setattr(api, "load", lambda name: limited)
    with pytest.raises(Unsupported) as caught:
        call(backend="limited", impl="torch")
    assert caught.value.reasons == (
        "it has no causal form",
        "it has no impl 'torch', only ",
        "its params are odd",
    )


NEEDS_LEARNED = "it needs parameters that a model must carry for it, and none were given"
LEARNING = [name for name in backend_names() if load(name).capabilities.learned]


def test_a_backend_whose_parameters_a_model_must_carry_gets_them_or_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    exact = load("exact").impls["torch"]

    def watched(q: Any, k: Any, v: Any, params: Any, call: Any) -> Any:
        seen.append(call.learned)
        return exact(q, k, v, params, call)

    toy = Backend(
        name="toy",
        summary="",
        paper="",
        params=Params,
        capabilities=Capabilities(
            causal=True, bidirectional=True, decode=True, exact=False, selection="row", learned=True
        ),
        impls={"torch": watched},
        workspace=lambda params, shape: Workspace(0),
    )
    monkeypatch.setattr(api, "load", lambda name: toy)
    with pytest.raises(Unsupported) as caught:
        call(backend="toy")
    assert caught.value.reasons == (NEEDS_LEARNED,)
    q, k, v = make_inputs(1, (4, 2), 8, 8, 16)
    packed = [Segment(slice(0, 5), k, v, 0), Segment(slice(5, 8), k, v, 2)]
    with pytest.raises(Unsupported, match=NEEDS_LEARNED):
        attend_packed(q, packed, backend="toy", **COMMON)
    own = object()
    call(backend="toy", learned=own)
    attend_packed(q, packed, backend="toy", learned=own, **COMMON)
    assert seen == [own] * 3


@pytest.mark.parametrize("backend", LEARNING)
def test_learned_parameters_that_are_missing_or_of_another_kind_or_size_are_refused(backend: str) -> None:
    with pytest.raises(Unsupported, match=NEEDS_LEARNED):
        call(backend=backend)
    for wrong in ({}, 3, torch.zeros(4, 3, 16), "clusters", load(backend).params()):
        for impl in ("torch", "reference"):
            with pytest.raises((TypeError, ValueError), match="learned must be"):
                call(backend=backend, learned=wrong, impl=impl)
    for heads, width in ((3, 16), (4, 12)):
        with pytest.raises(ValueError, match=r"heads|head_dim"):
            call(backend=backend, learned=LEARNED[backend](heads, width))


def test_packed_rows_must_belong_to_one_segment_each() -> None:
    q, k, v = make_inputs(1, (4, 2), 6, 6, 16)
    segments = [Segment(slice(0, 3), k, v, 0), Segment(slice(4, 6), k, v, 0)]
    with pytest.raises(ValueError, match="segment 1 has rows 4..6, expected them to begin at 3"):
        attend_packed(q, segments, backend="exact", **COMMON)
    with pytest.raises(ValueError, match="the segments cover 3 rows of 6"):
        attend_packed(q, segments[:1], backend="exact", **COMMON)
    with pytest.raises(ValueError, match="segment 0: start must lie in 0"):
        attend_packed(q, [Segment(slice(0, 6), k, v, 2)], backend="exact", **COMMON)


def test_registry_names_are_the_backends_names() -> None:
    assert {name: registry.load(name).name for name in backend_names()} == {
        name: name for name in backend_names()
    }


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_does_not_import_torch() -> None:
    assert (
        run_python("import sys, kernels; print('torch' in sys.modules, 'pydantic' in sys.modules)")
        == "False False"
    )


def test_listing_backends_imports_none_of_them() -> None:
    loaded = "[m for m in sys.modules if 'kernels.attention.' in m]"
    code = f"import sys, kernels; kernels.backend_names(); print({loaded})"
    assert run_python(code) == "[]"


def test_every_backend_imports_without_a_warning() -> None:
    assert run_python(
        "import kernels; print(len([kernels.describe(n, graph=False) for n in kernels.backend_names()]))"
    ) == str(len(backend_names()))


def test_transformers_does_not_take_this_package_for_the_hub_kernels() -> None:
    code = """
import kernels, torch, transformers
from transformers.utils.import_utils import is_kernels_available
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, vocab_size=32, max_position_embeddings=64)
model = LlamaForCausalLM(config).eval()
logits = model(torch.arange(5)[None]).logits
q = torch.randn(1, 2, 5, 8)
kernels.attend(q, q, q, backend="exact", causal=True, scale=1.0)
print(is_kernels_available(), tuple(logits.shape))
"""
    assert run_python(code) == "False (1, 5, 32)"
