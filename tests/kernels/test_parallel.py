"""Stretches of rows side by side: the same answer, from threads that leave torch's settings alone."""

from __future__ import annotations

import threading
from time import sleep
from typing import Any

import pytest
import torch

from kernels import api, attend, attend_packed, backend_names, parallel
from kernels.contract import Segment, Stats
from kernels.math.summaries import BlockSummaries
from kernels.registry import load
from tests.kernels.kernel_cases import make_inputs, scale_of

SPREAD = [name for name in backend_names() if api._spreads(load(name).capabilities)]


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", SPREAD)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("start", [0, 300])
def test_a_call_spread_over_threads_equals_the_call_on_one(
    backend: str, causal: bool, start: int, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = make_inputs(2, (4, 2), 2300, 2700, 32)
    common: dict[str, Any] = {"backend": backend, "causal": causal, "scale": scale_of(q), "start": start}
    monkeypatch.setattr(parallel, "MIN_FLOPS", 1 << 62)
    alone = attend(q, k, v, **common)
    monkeypatch.setattr(parallel, "MIN_FLOPS", 1)
    spread = attend(q, k, v, **common)
    torch.testing.assert_close(spread.out, alone.out, atol=1e-5, rtol=0)
    for name in ("lse", "dropped"):
        torch.testing.assert_close(getattr(spread, name), getattr(alone, name), atol=1e-4, rtol=0)
    for name in ("pairs_kept", "pairs_exact", "impl"):
        assert getattr(spread.stats, name) == getattr(alone.stats, name)
    assert spread.stats.dropped_mass == pytest.approx(alone.stats.dropped_mass, abs=1e-4)


def test_calls_are_spread_where_they_are_long_and_only_there(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str]] = []
    inner = parallel.side_by_side

    def watched(jobs: Any, device: torch.device) -> Any:
        seen.append((len(jobs), threading.current_thread().name))
        return inner(jobs, device)

    monkeypatch.setattr(parallel, "side_by_side", watched)
    for N in (1, 200, 4096):
        q, k, v = make_inputs(1, (4, 2), N, 4096, 32)
        attend(q, k, v, backend="pages", causal=True, scale=0.2)
    assert [count for count, _ in seen] == [8]


def test_a_thread_of_the_pool_computes_alone(two_threads: None) -> None:
    def job() -> int:
        torch.randn(64, 64) @ torch.randn(64, 64)
        return torch.get_num_threads()

    assert parallel.side_by_side([job] * 6, torch.device("cpu")) == [1] * 6
    assert torch.get_num_threads() == 2


def test_torch_keeps_its_number_of_threads_here_and_in_threads_to_come(two_threads: None) -> None:
    q, k, v = make_inputs(1, (4, 2), 4096, 4096, 32)
    attend(q, k, v, backend="xattention", causal=True, scale=0.2)
    found = [torch.get_num_threads()]
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2, 2]


def test_a_failure_in_a_stretch_is_the_calls_failure(two_threads: None) -> None:
    q, k, v = make_inputs(1, (4, 2), 4096, 4096, 32)
    with pytest.raises(ValueError, match="layer number 3"):
        attend(q, k, v, backend="topk", params={"budget": [64]}, causal=True, scale=0.2, layer=3)


def test_a_failure_is_raised_when_no_other_stretch_is_running_any_more(two_threads: None) -> None:
    ended: list[int] = []

    def fails() -> None:
        raise ValueError("the first")

    def takes_longer() -> None:
        sleep(0.1)
        ended.append(1)

    with pytest.raises(ValueError, match="the first"):
        parallel.side_by_side([fails, *[takes_longer] * 3], torch.device("cpu"))
    assert len(ended) == 3


def test_a_spread_call_works_in_inference_mode_and_fills_the_summaries(two_threads: None) -> None:
    q, k, v = make_inputs(1, (4, 2), 4096, 4096, 32)
    kept = BlockSummaries(5000)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            segment = Segment(slice(0, 4096), k, v, 0, 0, kept)
            attend_packed(q, [segment], backend="pages", causal=True, scale=0.2)
    assert kept.nbytes > 0


def test_what_stretches_count_is_added_up() -> None:
    def stats(n: int, heads: tuple[int, ...] | None) -> Stats:
        return Stats(n, 2 * n, 3 * n, 1.0, 3.0, "torch", 4 * n, 5 * n, None, 6 * n, heads)

    whole = parallel._side_by_side([stats(10, (3, 7)), stats(30, (20, 10))], 100.0, None)
    assert whole == Stats(40, 80, 120, 25.0, 75.0, "torch", 160, 200, None, 240, (23, 17))
    assert parallel._side_by_side([stats(1, None), stats(2, None)], 1.0, None).kept_per_head is None
