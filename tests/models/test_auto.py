"""The policy of ``auto``: which rung each layer gets, and that nothing but the arguments decides it."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from models.auto import (
    DEFAULT_POLICY,
    LayerChoice,
    Policy,
    as_json,
    exact_ms,
    limit,
    plan,
    read_plan,
    rung_share,
)
from models.auto_check import check
from models.calibrate_ladders import Calibration, Sample, Timing
from models.profile import Ladder, Length, Made, Profile, Rung, Stamp, Text

STAMP = Stamp(
    model="tiny", fingerprint="f", dtype="float32", device="cpu", processor="p", threads=2, torch="2"
)
MADE = Made(command="c", date="2026-01-01", seconds=1.0, chunk_tokens=512, seed=0, texts=())
LENGTHS = (1024, 4096)
CERTAIN = Policy(z=0.0)
"""The limit is what the calibration's documents kept, nothing added."""


def rung(
    backend: str,
    errors: Sequence[float],
    shares: Sequence[float],
    *,
    spread: float | None = 0.0,
    **params: Any,
) -> Rung:
    figures = tuple(errors)
    return Rung(
        backend=backend,
        params=params,
        spread=(spread,) * len(figures),
        median=figures,
        p95=figures,
        max=figures,
        time_share=tuple(shares),
    )


def exact(lengths: int = 2) -> Rung:
    return rung("exact", (0.0,) * lengths, (1.0,) * lengths)


def profile(
    *ladders: Sequence[Rung],
    lengths: Sequence[int] = LENGTHS,
    attention_ms: float = 900.0,
    rest_ms: float = 100.0,
    documents: int = 8,
) -> Profile:
    """``attention_ms`` and ``rest_ms`` at 1,024 tokens; they grow as N^2 and N."""
    return Profile(
        stamp=STAMP,
        made=MADE,
        lengths=tuple(
            Length(
                tokens=n,
                documents=documents,
                attention_ms=attention_ms * (n / 1024) ** 2,
                rest_ms=rest_ms * n / 1024,
            )
            for n in lengths
        ),
        layers=tuple(
            Ladder(layer=number, rungs=(*rungs, exact(len(lengths)))) for number, rungs in enumerate(ladders)
        ),
    )


CHEAP = rung("sinks", (0.1, 0.3), (0.5, 0.2), window=256)
DEAR = rung("pooled", (0.04, 0.08), (0.8, 0.5), budget=1024)


@pytest.mark.parametrize(
    ("tokens", "max_error", "backends", "reason"),
    [
        (4096, 0.30, ["sinks"], "chosen"),
        (4096, 0.29, ["pooled"], "chosen"),
        (4096, 0.08, ["pooled"], "chosen"),
        (4096, 0.07, ["exact"], "all layers need exact"),
        (2048, 0.20, ["sinks"], "chosen"),
        (2048, 0.19, ["pooled"], "chosen"),
        (1024, 0.05, ["pooled"], "chosen"),
        (1023, 0.50, ["exact"], "too short"),
        (6144, 0.50, ["sinks"], "chosen"),
        (6145, 0.50, ["exact"], "too long"),
    ],
)
def test_a_layer_gets_the_cheapest_rung_that_keeps_the_budget(
    tokens: int, max_error: float, backends: list[str], reason: str
) -> None:
    found = plan(profile([CHEAP, DEAR]), tokens, max_error, CERTAIN)
    assert ([each.backend for each in found.layers], found.reason) == (backends, reason)


def test_layers_choose_apart() -> None:
    tame = rung("sinks", (0.01, 0.01), (0.5, 0.2), window=256)
    found = plan(profile([CHEAP, DEAR], [tame]), 4096, 0.1, CERTAIN)
    assert found.layers == (
        LayerChoice(0, "pooled", {"budget": 1024}),
        LayerChoice(1, "sinks", {"window": 256}),
    )
    assert found.attention_share == pytest.approx(0.35)


def test_errors_lie_on_a_line_in_log_tokens_between_calibrated_lengths() -> None:
    assert limit(profile([CHEAP]), CHEAP, 2048, CERTAIN) == pytest.approx(0.2)


def test_beyond_the_longest_length_an_error_goes_on_growing_and_never_falls() -> None:
    falling = rung("sinks", (0.3, 0.1), (0.5, 0.2))
    assert limit(profile([CHEAP]), CHEAP, 6144, CERTAIN) > 0.3
    assert limit(profile([falling]), falling, 6144, CERTAIN) == pytest.approx(0.1)


def test_times_between_lengths_follow_powers_of_the_length() -> None:
    assert exact_ms(profile([CHEAP]), 2048) == pytest.approx((3600, 200))
    assert exact_ms(profile([CHEAP]), 6000) == pytest.approx((900 * (6000 / 1024) ** 2, 100 * 6000 / 1024))


def test_the_predicted_total_counts_the_rest_of_the_forward() -> None:
    found = plan(profile([CHEAP], attention_ms=900, rest_ms=900), 1024, 0.2, CERTAIN)
    assert (found.attention_share, found.time_share) == pytest.approx((0.5, 0.75))


def test_below_the_crossover_every_layer_is_exact() -> None:
    slow = rung("sinks", (0.01, 0.01), (0.99, 0.2), window=256)
    assert plan(profile([slow]), 1024, 0.2, CERTAIN).reason == "below the crossover"
    assert plan(profile([slow]), 4096, 0.2, CERTAIN).reason == "chosen"
    little_attention = profile([CHEAP], attention_ms=1, rest_ms=1000)
    found = plan(little_attention, 4096, 0.3, CERTAIN)
    assert (found.reason, found.is_exact, found.time_share) == ("below the crossover", True, 1.0)


def test_a_rung_dearer_than_exact_is_never_chosen() -> None:
    dearer = rung("pooled", (0.0, 0.0), (1.5, 1.2))
    assert plan(profile([dearer]), 4096, 0.2, CERTAIN).is_exact


def test_documents_that_differ_and_documents_that_are_few_widen_the_margin() -> None:
    def margin(spread: float | None, documents: int) -> float:
        its = CHEAP.model_copy(update={"spread": (spread, spread)})
        return limit(profile([its], documents=documents), its, 4096) / 0.3

    assert margin(0.3, 50) < margin(0.3, 2) < margin(None, 1)
    assert margin(0.1, 8) < margin(0.2, 8) < margin(0.4, 8)
    drawn_to = math.sqrt((2 * 0.3**2 + 1 * 0.2**2) / 3)
    assert margin(0.2, 2) == pytest.approx(math.exp(1.645 * drawn_to * math.sqrt(1 + 1 / 2)))
    assert margin(None, 1) == pytest.approx(math.exp(1.645 * 0.3 * math.sqrt(2)))


def test_the_limit_is_never_below_what_the_documents_of_the_calibration_kept() -> None:
    outlier = Rung(
        backend="sinks",
        params={},
        spread=(0.01, 0.01),
        median=(0.1, 0.1),
        p95=(0.4, 0.4),
        max=(0.5, 0.5),
        time_share=(0.5, 0.5),
    )
    assert limit(profile([outlier]), outlier, 1024) == 0.4


def test_one_calibrated_length_serves_up_to_the_stated_factor() -> None:
    one = profile([rung("sinks", (0.1,), (0.5,))], lengths=(1024,))
    assert [plan(one, n, 0.2, CERTAIN).reason for n in (1023, 1024, 1536, 1537)] == [
        "too short",
        "chosen",
        "chosen",
        "too long",
    ]


@pytest.mark.parametrize(
    ("tokens", "max_error", "told"),
    [(0, 0.1, "tokens"), (1024, 0.0, "max_error"), (1024, -1.0, "max_error"), (1024, math.nan, "max_error")],
)
def test_arguments_out_of_range_are_named(tokens: int, max_error: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plan(profile([CHEAP]), tokens, max_error)


def drawn(seed: int) -> Profile:
    """Any profile at all: no order among its rungs, errors and times of any sizes."""
    draw = random.Random(seed)
    lengths = sorted(draw.sample(range(64, 20000), draw.randint(1, 5)))

    def any_rung(number: int) -> Rung:
        errors = [sorted(draw.choice((0.0, draw.lognormvariate(-2.5, 1))) for _ in range(3)) for _ in lengths]
        return Rung(
            backend=draw.choice(("sinks", "pooled")),
            params={"number": number},
            spread=tuple(draw.choice((None, 0.0, draw.uniform(0, 0.5))) for _ in lengths),
            median=tuple(each[0] for each in errors),
            p95=tuple(each[1] for each in errors),
            max=tuple(each[2] for each in errors),
            time_share=tuple(draw.uniform(0.05, 1.6) for _ in lengths),
        )

    ladders = [[any_rung(n) for n in range(draw.randint(0, 6))] for _ in range(draw.randint(1, 8))]
    made = profile(
        *ladders,
        lengths=lengths,
        attention_ms=draw.uniform(1, 1000),
        rest_ms=draw.choice((0.0, draw.uniform(1, 1000))),
        documents=draw.randint(1, 30),
    )
    return made


def any_tokens(made: Profile, draw: random.Random) -> int:
    return round(draw.uniform(0.9 * made.lengths[0].tokens, 1.6 * made.lengths[-1].tokens))


@pytest.mark.parametrize("seed", range(200))
def test_a_larger_budget_never_costs_more(seed: int) -> None:
    made, draw = drawn(seed), random.Random(-seed)
    tokens = any_tokens(made, draw)
    shares = [
        plan(made, tokens, error).time_share for error in sorted(draw.uniform(0.001, 1) for _ in range(8))
    ]
    assert shares == sorted(shares, reverse=True)
    assert all(share <= 1 for share in shares)


@pytest.mark.parametrize("seed", range(200))
def test_every_chosen_rung_keeps_the_budget_and_no_cheaper_one_would(seed: int) -> None:
    made, draw = drawn(seed), random.Random(-seed)
    tokens, max_error = any_tokens(made, draw), draw.uniform(0.01, 0.6)
    found = plan(made, tokens, max_error)
    assert [each.layer for each in found.layers] == [ladder.layer for ladder in made.layers]
    for chosen, ladder in zip(found.layers, made.layers, strict=True):
        (its,) = [r for r in ladder.rungs if (r.backend, r.params) == (chosen.backend, chosen.params)]
        assert its.is_exact or limit(made, its, tokens) <= max_error
        for other in ladder.rungs if found.reason == "chosen" else ():
            cheaper = rung_share(made, other, tokens) < rung_share(made, its, tokens)
            assert not cheaper or limit(made, other, tokens) > max_error
    assert found.max_limit <= max_error


@pytest.mark.parametrize("seed", range(50))
def test_a_plan_survives_json_and_is_the_same_every_time(seed: int) -> None:
    made, draw = drawn(seed), random.Random(-seed)
    tokens, max_error = any_tokens(made, draw), draw.uniform(0.01, 0.6)
    first = plan(made, tokens, max_error)
    plan(made, tokens // 2 + 1, 2 * max_error)
    again = plan(Profile.model_validate_json(made.model_dump_json()), tokens, max_error)
    assert again == first
    assert read_plan(json.loads(json.dumps(as_json(first.layers)))) == first.layers


GOOD = {"layer": 0, "backend": "sinks", "params": {}}


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({}, "plan must be a list"),
        ([], "plan must be a list"),
        ([GOOD, 3], r"plan\[1\] must have"),
        ([{**GOOD, "more": 1}], r"plan\[0\] must have"),
        ([{**GOOD, "layer": True}], r"plan\[0\]\.layer"),
        ([{**GOOD, "layer": -1}], r"plan\[0\]\.layer"),
        ([{**GOOD, "backend": None}], r"plan\[0\]\.backend"),
        ([{**GOOD, "params": []}], r"plan\[0\]\.params"),
        ([GOOD, GOOD], r"plan\[1\]\.layer is 0 after 0"),
    ],
)
def test_a_plan_that_is_none_is_refused_by_place(raw: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_plan(raw)


def test_the_margin_is_a_policy_that_can_be_stated() -> None:
    careful = replace(DEFAULT_POLICY, z=3.0)
    made = profile([each.model_copy(update={"spread": (0.2, 0.2)}) for each in (CHEAP, DEAR)])
    assert plan(made, 4096, 0.45).layers[0].backend == "sinks"
    assert plan(made, 4096, 0.45, careful).layers[0].backend == "pooled"


@pytest.mark.parametrize(
    "change", [{"z": -1.0}, {"assumed_documents": 0}, {"max_extrapolation": 0.9}, {"min_saving": 1.0}]
)
def test_a_policy_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(DEFAULT_POLICY, **change)


def test_planning_needs_no_torch() -> None:
    code = "import sys, models.auto, models.calibrate_ladders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def measured(*errors: float, texts: int = 3) -> Calibration:
    """Document d's error under ``sinks`` in one layer; ``pooled`` errs half as much in twice the time."""
    samples = [
        Sample(
            document=document,
            tokens=1024,
            layer=0,
            rung=place,
            error=error / (1 + place),
            attention_s=0.3 + 0.3 * place,
            selection_s=0.0,
            exact_attention_s=1.0,
            density=0.25 + 0.5 * place,
        )
        for document, error in enumerate(errors)
        for place in (0, 1)
    ]
    made = MADE.model_copy(update={"texts": tuple(Text(name=str(n), sha256="") for n in range(texts))})
    rungs = (("sinks", {"window": 64}), ("pooled", {"budget": 64}))
    return Calibration(STAMP, made, tuple(samples), (Timing(1024, 100.0, 0.0),), rungs)


def test_a_check_tries_each_text_on_the_plan_of_the_others() -> None:
    (row,) = check(measured(0.1, 0.1, 0.19), (0.12,), CERTAIN)
    assert (row.documents, row.layer_documents, row.tokens, row.max_error) == (3, 3, 1024, 0.12)
    # The third text's plan knows of .1 alone and takes sinks; the others have seen .19.
    assert row.worst == pytest.approx(0.19 / 0.12)
    assert (row.within, row.far_above) == pytest.approx((2 / 3, 1 / 3))
    assert row.density == pytest.approx((0.75 + 0.75 + 0.25) / 3)
    assert row.time_share == row.attention_share == pytest.approx((0.6 + 0.6 + 0.3) / 3)


def test_a_check_of_documents_that_are_alike_finds_them_within_the_budget() -> None:
    rows = check(measured(*[0.1] * 6), (0.04, 0.05, 0.1), CERTAIN)
    assert [(row.within, row.exact, row.density) for row in rows] == [(1, 1, 1), (1, 0, 0.75), (1, 0, 0.25)]


def test_a_check_leaves_a_texts_other_documents_out_too() -> None:
    (row,) = check(measured(0.1, 0.3, 0.1, 0.3, texts=2), (0.12,), CERTAIN)
    assert row.worst == pytest.approx(0.3 / 0.12)


def test_a_check_needs_two_texts() -> None:
    with pytest.raises(ValueError, match="two texts"):
        check(measured(0.1, texts=1), (0.1,))
