"""A shipped profile on another machine: its errors, this machine's times."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests.tiny_models import write_models
from models import calibrate_times
from models.auto import plan
from models.calibrate import Sizes, Source, calibrate
from models.calibrate_default import (
    SHIPPED,
    cached,
    calibrated_for,
    keep,
    measurement_for,
    profile_for,
    shipped_for,
)
from models.calibrate_ladders import Timing
from models.calibrate_model import WorkClock
from models.calibrate_times import picked_layers, retime, rungs_of
from models.contract import ModelError
from models.loader import load_model
from models.profile import Profile, Rung, load, profile_file, save
from models.profile_stamp import fingerprint, stamp_of
from models.quality_contenders import contender
from models.quality_error import ErrorRow
from models.quality_options import DEFAULT_TEXT
from models.runner import Model

TEXT = " ".join(f"This is sentence {n} of a text about the number {n * n}." for n in range(60))
SOURCES = [Source("text", TEXT)]
SHARE = 0.25
"""Of a rung that was found to take as long here as there."""


def silent(line: str) -> None:
    pass


def loaded(name: str, directory: Path, dtype: str = "float32") -> Model:
    model = load_model(name, str(directory), dtype=dtype, progress=silent)
    assert isinstance(model, Model)
    return model


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def decoder(directories: dict[str, Path]) -> Model:
    return loaded("tiny", directories["tiny-decoder"])


@pytest.fixture(scope="module")
def shipped(decoder: Model) -> Profile:
    """As another machine might have made it: rungs kept whatever they took, all times stated."""
    rungs = [contender("sinks", {"window": 64}), contender("pooled", {"budget": 64, "block_size": 32})]
    sizes = Sizes(lengths=(64, 128, 256), documents=2)
    made = calibrate(decoder, SOURCES, rungs, sizes, command="c", date="2026-01-01", progress=silent)
    return elsewhere(made.profile(), {each.backend: each.params for each in rungs})


def elsewhere(profile: Profile, params: dict[str, dict[str, Any]]) -> Profile:
    def rung(number: int, backend: str) -> Rung:
        """Errors fall from the cheap rung to the dear one and differ by length and layer."""
        errors = tuple(0.3 / (place + number + 1) for place in range(3))
        figures = {"median": errors, "p95": errors, "max": errors, "spread": (0.1, 0.1, None)}
        return Rung(
            backend=backend, params=params[backend], time_share=(SHARE * (number + 1),) * 3, **figures
        )

    layers = tuple(
        ladder.model_copy(update={"rungs": (rung(0, "sinks"), rung(1, "pooled"), ladder.rungs[-1])})
        for ladder in profile.layers
    )
    grows = [(64, 1.0, 10.0), (128, 4.0, 20.0), (256, 16.0, 40.0)]
    lengths = tuple(
        length.model_copy(update={"attention_ms": attention, "rest_ms": rest})
        for length, (_, attention, rest) in zip(profile.lengths, grows, strict=True)
    )
    stamp = profile.stamp.model_copy(update={"processor": "another", "threads": 96, "model": "theirs"})
    return profile.model_copy(update={"layers": layers, "lengths": lengths, "stamp": stamp})


class Machine:
    """What things take here, stated: ``shares`` by backend, exact's times by length; each length takes so
    many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **shares: float) -> None:
        self.now = 0.0
        self.shares = shares
        self.seconds: Callable[[int], float] = lambda tokens: 1.0
        self.read: list[int] = []
        self._measure_layer = calibrate_times.measure_layer
        monkeypatch.setattr("models.calibrate_times.time_exact", self.time_exact)
        monkeypatch.setattr("models.calibrate_times.measure_layer", self.measure_layer)

    def clock(self) -> float:
        return self.now

    def time_exact(self, model: Model, token_ids: list[int], *rest: Any) -> Timing:
        tokens = len(token_ids)
        self.read.append(tokens)
        self.now += self.seconds(tokens)
        return Timing(tokens, 3.0 * (tokens / 64) ** 2, 5.0 * tokens / 64)

    def measure_layer(self, *given: Any) -> list[ErrorRow]:
        rows = self._measure_layer(*given)
        return [
            replace(row, attention_s=self.shares[row.backend], selection_s=0.0, exact_attention_s=1.0)
            for row in rows
        ]


def retimed(shipped: Profile, decoder: Model, machine: Machine, **more: Any) -> Profile:
    given = {"longest": 256, "progress": silent, "clock": machine.clock, **more}
    return retime(shipped, decoder, stamp_of(decoder), SOURCES, **given)


def errors(profile: Profile) -> dict[tuple[int, str], tuple[Any, ...]]:
    return {
        (ladder.layer, rung.backend): (rung.params, rung.median, rung.p95, rung.max, rung.spread)
        for ladder in profile.layers
        for rung in ladder.rungs
    }


def test_errors_stay_and_times_are_this_machines(
    shipped: Profile, decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, sinks=0.5, pooled=0.6)
    found = retimed(shipped, decoder, machine)
    assert errors(found) == errors(shipped)
    assert found.stamp == stamp_of(decoder)
    assert {rung.time_share for ladder in found.layers for rung in ladder.rungs} == {
        (0.5,) * 3,
        (0.6,) * 3,
        (1.0,) * 3,
    }
    assert [(each.attention_ms, each.rest_ms) for each in found.lengths] == [(3, 5), (12, 10), (48, 20)]
    assert [each.documents for each in found.lengths] == [2, 2, 2]


def test_it_is_told_where_errors_and_times_come_from(
    shipped: Profile, decoder: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, sinks=0.5, pooled=0.6)
    found = retimed(shipped, decoder, machine)
    times = found.made.times
    assert times is not None and times.errors_from == shipped.stamp
    assert found.made.model_copy(update={"times": None}) == shipped.made
    assert (times.tokens, times.layers) == ((64, 128, 256), tuple(picked_layers(shipped)))
    assert [text.name for text in times.texts] == ["text"]
    save(found, tmp_path / "p.json")
    assert load(tmp_path / "p.json", stamp_of(decoder)) == found


def test_what_a_layer_takes_beside_the_others_is_kept(
    shipped: Profile, decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shipped.layers[0]
    dear = first.rungs[0].model_copy(update={"time_share": (2 * SHARE,) * 3})
    odd = first.model_copy(update={"rungs": (dear, *first.rungs[1:])})
    told = shipped.model_copy(update={"layers": (odd, *shipped.layers[1:])})
    found = retimed(told, decoder, Machine(monkeypatch, sinks=0.4, pooled=0.9))
    shares = [
        rung.time_share[0] for ladder in found.layers for rung in ladder.rungs if rung.backend == "sinks"
    ]
    assert shares == pytest.approx([0.8, 0.4, 0.4, 0.4])


def test_rungs_are_sorted_anew_and_those_no_longer_worth_it_are_left_out(
    shipped: Profile, decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = retimed(shipped, decoder, Machine(monkeypatch, sinks=0.9, pooled=0.2))
    assert {tuple(rung.backend for rung in ladder.rungs) for ladder in found.layers} == {("pooled", "exact")}
    found = retimed(shipped, decoder, Machine(monkeypatch, sinks=0.2, pooled=1.2))
    assert {tuple(rung.backend for rung in ladder.rungs) for ladder in found.layers} == {("sinks", "exact")}


def test_a_length_that_there_is_no_time_for_goes_on_from_the_longest_measured(
    shipped: Profile, decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, sinks=0.5, pooled=0.6)
    monkeypatch.setattr("models.calibrate_times._seconds", lambda found, shipped: 10.0)
    told: list[str] = []
    found = retimed(shipped, decoder, machine, minutes=0.5, progress=told.append)
    assert found.made.times is not None and found.made.times.tokens == (64,)
    assert any("128 tokens and more: not measured here" in line for line in told)
    assert [(each.attention_ms, each.rest_ms) for each in found.lengths] == [(3, 5), (12, 10), (48, 20)]
    assert {rung.time_share for rung in found.layers[0].rungs[:-1]} == {(0.5,) * 3, (0.6,) * 3}
    assert max(machine.read) == 64


def test_the_shortest_length_is_measured_however_little_time_there_is(
    shipped: Profile, decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, sinks=0.5, pooled=0.6)
    machine.seconds = lambda tokens: 1e3
    found = retimed(shipped, decoder, machine, minutes=0.001)
    assert machine.read == [64]
    assert found.made.times is not None and found.made.times.seconds == 1e3


def test_lengths_beyond_what_may_be_read_or_what_texts_hold_are_carried_over(
    shipped: Profile, decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, sinks=0.5, pooled=0.6)
    assert retimed(shipped, decoder, machine, longest=128).made.times.tokens == (64, 128)  # type: ignore[union-attr]
    short = [Source("short", TEXT[:150])]
    found = retime(
        shipped, decoder, stamp_of(decoder), short, longest=256, progress=silent, clock=machine.clock
    )
    assert found.made.times is not None and found.made.times.tokens == (64, 128)
    with pytest.raises(ModelError, match="no text has 64 tokens"):
        retime(shipped, decoder, stamp_of(decoder), [Source("tiny", "Hi.")], longest=256, progress=silent)


def test_measured_for_real_it_plans_as_any_profile(shipped: Profile, decoder: Model) -> None:
    seen: list[str] = []
    found = retime(
        shipped, decoder, stamp_of(decoder), SOURCES, longest=256, progress=silent, watch=seen.append
    )
    assert all(each.attention_ms > 0 and each.rest_ms > 0 for each in found.lengths)
    assert all(rung.time_share[0] > 0 for ladder in found.layers for rung in ladder.rungs)
    assert len(plan(found, 200, 0.9).layers) == len(decoder.info.applied_layers)
    assert any("layer" in line and "256 tokens" in line for line in seen)


def test_a_shipped_profile_is_found_by_weights_and_dtype_alone(
    shipped: Profile, decoder: Model, tmp_path: Path
) -> None:
    stamp = stamp_of(decoder)
    assert shipped_for(stamp, silent, tmp_path / "none") is None
    save(shipped, tmp_path / "tiny.json")
    assert shipped_for(stamp, silent, tmp_path) == shipped
    for change in ({"fingerprint": "0" * 64}, {"dtype": "bfloat16"}):
        assert shipped_for(stamp.model_copy(update=change), silent, tmp_path) is None


def test_a_shipped_file_that_this_release_cannot_read_or_run_is_told_and_passed_over(
    shipped: Profile, decoder: Model, tmp_path: Path
) -> None:
    save(shipped, tmp_path / "b.json")
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    text = (tmp_path / "b.json").read_text(encoding="utf-8")
    (tmp_path / "aa.json").write_text(text.replace('"pooled"', '"vanished"'), encoding="utf-8")
    told: list[str] = []
    assert shipped_for(stamp_of(decoder), told.append, tmp_path) == shipped
    assert [line.split(":")[0] for line in told] == ["a.json", "aa.json"]


def test_at_first_use_the_times_of_a_shipped_profile_are_measured_and_kept(
    shipped: Profile, decoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(shipped, tmp_path / "shipped" / "tiny.json")
    monkeypatch.setattr("models.calibrate_default.SHIPPED", tmp_path / "shipped")
    stamp = stamp_of(decoder)
    todo = measurement_for(decoder, stamp, None, silent)
    assert (todo.source, todo.minutes) == ("shipped", 1.0)
    assert todo.num_bytes > 0 and todo.flops > 0
    found = profile_for(decoder, tmp_path, silent)
    assert found.made.times is not None and found.made.times.errors_from == shipped.stamp
    assert cached(stamp, tmp_path, silent) == found


def in_cache(profile: Profile, cache_dir: Path, name: str = "theirs") -> Profile:
    """As ``longreach calibrate`` left it there on another machine."""
    made = profile.made.model_copy(update={"command": f"longreach calibrate {name} book.txt"})
    found = profile.model_copy(update={"made": made})
    save(found, cache_dir / "profiles" / f"{name}.json")
    return found


def test_a_calibration_of_another_machine_gives_the_errors_and_the_newest_one_does(
    shipped: Profile, decoder: Model, tmp_path: Path
) -> None:
    stamp = stamp_of(decoder)
    assert calibrated_for(stamp, tmp_path, silent) is None
    in_cache(shipped, tmp_path, "b")
    newer = in_cache(shipped, tmp_path, "a")
    os.utime(tmp_path / "profiles" / "b.json", (1, 1))
    assert calibrated_for(stamp, tmp_path, silent) == newer
    save(shipped, tmp_path / "profiles" / "quick.json")  # made by no calibration
    (tmp_path / "profiles" / "damaged.json").write_text("1" * 5000, encoding="utf-8")
    told: list[str] = []
    assert calibrated_for(stamp, tmp_path, told.append) == newer
    assert len(told) == 1 and "damaged.json: not used" in told[0]
    assert calibrated_for(stamp.model_copy(update={"dtype": "bfloat16"}), tmp_path, silent) is None


def test_a_calibration_that_cannot_be_timed_here_is_passed_over(
    shipped: Profile, decoder: Model, tmp_path: Path
) -> None:
    """The texts at hand are too short for it, or the memory too small."""
    stamp, cache, beside = stamp_of(decoder), tmp_path / "cache", tmp_path / "shipped"
    save(shipped, beside / "tiny.json")

    def source(max_bytes: int | None, told: list[str]) -> str:
        return measurement_for(decoder, stamp, max_bytes, told.append, beside, cache_dir=cache).source

    told: list[str] = []
    in_cache(shipped, cache)
    assert source(None, told) == "calibrated" and not told
    lengths = tuple(each.model_copy(update={"tokens": each.tokens * 10**6}) for each in shipped.lengths)
    in_cache(shipped.model_copy(update={"lengths": lengths}), cache)
    assert source(None, told) == "shipped"
    assert "its calibration begins at 64,000,000 tokens, too many to time here" in told[0]
    in_cache(at_length(shipped, 2), cache)
    save(at_length(shipped, 0), beside / "tiny.json")
    room = measurement_for(decoder, stamp, None, silent, beside).num_bytes
    assert source(room, told) == "shipped" and "begins at 256 tokens" in told[1]


def at_length(profile: Profile, place: int) -> Profile:
    """With one length alone."""

    def cut(rung: Rung) -> Rung:
        names = ("median", "p95", "max", "spread", "time_share")
        return rung.model_copy(update={name: (getattr(rung, name)[place],) for name in names})

    layers = tuple(
        each.model_copy(update={"rungs": tuple(cut(rung) for rung in each.rungs)}) for each in profile.layers
    )
    return profile.model_copy(update={"lengths": (profile.lengths[place],), "layers": layers})


def test_a_profile_in_the_cache_that_this_release_cannot_run_is_told_and_passed_over(
    shipped: Profile, decoder: Model, tmp_path: Path
) -> None:
    stamp, layers = stamp_of(decoder), decoder.info.applied_layers
    mine = shipped.model_copy(update={"stamp": stamp})
    file, told = profile_file(tmp_path, stamp), list[str]()
    save(mine, file)
    assert cached(stamp, tmp_path, told.append, layers) == mine and not told
    assert cached(stamp, tmp_path, told.append, (*layers, 99)) is None and "is of layers" in told[0]
    text = file.read_text(encoding="utf-8")
    for wrong in (text.replace('"pooled"', '"vanished"'), text.replace('"budget"', '"bugdet"'), "9" * 5000):
        file.write_text(wrong, encoding="utf-8")
        assert cached(stamp, tmp_path, told.append, layers) is None
    assert len(told) == 4 and all(line.endswith("Not used") for line in told)


def test_half_of_the_memory_decides_the_longest_length_and_all_of_it_the_shortest(
    shipped: Profile, decoder: Model, tmp_path: Path
) -> None:
    save(shipped, tmp_path / "tiny.json")
    stamp = stamp_of(decoder)
    whole = measurement_for(decoder, stamp, None, silent, tmp_path)
    told: list[str] = []
    same = measurement_for(decoder, stamp, 2 * whole.num_bytes, told.append, tmp_path)
    assert same.num_bytes == whole.num_bytes and not told
    less = measurement_for(decoder, stamp, 2 * whole.num_bytes - 1, told.append, tmp_path)
    assert less.num_bytes < whole.num_bytes and less.flops < whole.flops
    assert "no memory for more than 128 tokens" in told[0]
    tight = measurement_for(decoder, stamp, less.num_bytes, told.append, tmp_path)
    assert "no memory for more than 64 tokens" in told[1]
    assert measurement_for(decoder, stamp, tight.num_bytes, silent, tmp_path).num_bytes == tight.num_bytes
    with pytest.raises(ModelError, match=r"requests may hold 1,000 \(memory_limit_bytes\)"):
        measurement_for(decoder, stamp, 1000, silent, tmp_path)
    with pytest.raises(ModelError, match="memory_limit_bytes"):
        measurement_for(decoder, stamp, 1000, silent, tmp_path / "none")


def test_what_is_shipped_can_be_read_and_run_and_comes_with_the_package() -> None:
    for file in SHIPPED.glob("*.json"):
        found = load(file)
        assert rungs_of(found) and file.stem == found.stamp.model
        assert found.made.times is None, "times of another machine than the errors are nobody's"
    root = SHIPPED.parents[1]
    setup = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "profiles/*.json" in setup["package-data"]["models"]
    assert DEFAULT_TEXT.parent == root / "samples" and "*.txt" in setup["package-data"]["samples"]
    assert "samples" in setup["packages"]["find"]["include"]


def test_longer_lengths_are_expected_to_take_as_long_as_they_grow_in_the_profile(
    shipped: Profile, decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read once here, 64 tokens take 3 + 5 ms, twice, and 3 of 4 layers the rungs beside exact."""
    machine = Machine(monkeypatch, sinks=0.5, pooled=0.5)
    expected_s = (2 * 8 + 3 / 4 * 2 * 3) / 1e3
    machine.seconds = lambda tokens: 0.5
    for spare_s, tokens in ((-0.001, (64,)), (0.001, (64, 128))):
        budget_s = 0.5 + 4 * expected_s + spare_s
        found = retimed(shipped, decoder, machine, minutes=budget_s / 60)
        assert found.made.times is not None and found.made.times.tokens[:2] == tokens


def test_a_model_of_short_texts_is_measured_at_its_longest(decoder: Model, tmp_path: Path) -> None:
    short = decoder.with_max_tokens(200)
    told: list[str] = []
    with_quick = measurement_for(short, stamp_of(short), None, told.append, tmp_path)
    found = with_quick.run(silent, silent, lambda: 0.0)
    assert [length.tokens for length in found.lengths] == [200]


def test_a_cache_that_cannot_be_written_is_told_and_no_failure(shipped: Profile, tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("in the way", encoding="utf-8")
    told: list[str] = []
    keep(shipped, tmp_path, told.append)
    assert "could not be kept" in told[0]
    assert not profile_file(tmp_path, shipped.stamp).exists()


def test_the_layers_measured_are_the_first_the_last_and_one_between(shipped: Profile) -> None:
    def of(count: int) -> list[int]:
        ladder = shipped.layers[0]
        layers = tuple(ladder.model_copy(update={"layer": 2 * n}) for n in range(count))
        return picked_layers(shipped.model_copy(update={"layers": layers}))

    assert [of(count) for count in (1, 2, 3, 30)] == [[0], [0, 2], [0, 2, 4], [0, 28, 58]]
    assert [each.backend for each in rungs_of(shipped)] == ["sinks", "pooled"]


def test_a_fingerprint_does_not_depend_on_how_the_weights_were_loaded(
    decoder: Model, directories: dict[str, Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "moved" / "under-another-name"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to(directories["tiny-decoder"], target_is_directory=True)
    one = fingerprint(decoder._network)
    assert fingerprint(loaded("other", elsewhere)._network) == one
    assert fingerprint(loaded("half", elsewhere, "bfloat16")._network) != one
    again = fingerprint(loaded("half", elsewhere, "bfloat16")._network)
    assert again == fingerprint(loaded("half2", elsewhere, "bfloat16")._network)


def test_the_clock_of_work_stands_while_the_work_does() -> None:
    now = 10.0
    clock = WorkClock(lambda: now)
    clock.go()
    began = clock()
    now += 1
    clock.stop()
    now += 100
    clock.go()
    now += 2
    assert clock() - began == 3
