"""Times every backend against dense SDPA and compiled FlexAttention on the same mask, in turns in one run.

    python -m kernels.bench --decode --edges --json bench.json --plot bench.png         everything
    python -m kernels.bench --quick --backends window bigbird                 seconds

A shape is HxHkxD. All contenders of one length, shape and direction take turns and the median of each is
reported: on a shared machine only ratios within one run mean anything. Work is counted as 4 D FLOP per
score element computed, masked ones included, dense SDPA's as well, and what a backend counts beside
(features, hashes, clusters). Backends that need a model's own parameters get random clusters
(``kernels.math.sbm.random_clusters``); ``--edges`` times them at one length over the number of edges. Calls
of more than five seconds are timed once, dense SDPA's twice up to twelve (``1 call`` beyond). Dense SDPA
without a mask at 32,768 tokens and more is timed on the last eighth of the rows and extrapolated (``~``).
The error is against the backend's own definition (impl ``reference``), and against exact attention on
inputs that are synthetic: it compares methods and says nothing about text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import perf_counter

from kernels.benchmarks.arguments import Options, options
from kernels.benchmarks.cases import Case, groups, why_not
from kernels.benchmarks.decode import MAX_ROUNDS, run_decode, why_no_decode
from kernels.benchmarks.edges import edge_cases, edge_growths, run_edges
from kernels.benchmarks.group import Effort, run_group
from kernels.benchmarks.growth import growths
from kernels.benchmarks.machine import machine
from kernels.benchmarks.measure import Budget, sgemm_gflops
from kernels.benchmarks.plot import plot
from kernels.benchmarks.record import LeftOut, Record
from kernels.benchmarks.tables import (
    decode_header,
    decode_line,
    edge_growth_list,
    edge_header,
    edge_line,
    growth_table,
    header,
    left_out_list,
    line,
)

__all__ = ["main", "sgemm_gflops"]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    asked = options(arguments, (__doc__ or "").split("\n")[0])
    record = Record(machine(arguments, sgemm_gflops()), asked.inputs)
    print(record.machine.head())
    if asked.prefill:
        _prefill(asked, record)
    if asked.decode:
        _decode(asked, record)
    if asked.edges:
        _edges(asked, record)
    record.complete = True
    _finish(asked, record)
    return 1 if record.failures else 0


def _prefill(asked: Options, record: Record) -> None:
    print(header(asked.inputs))
    effort = _effort(asked)
    began = perf_counter()
    for cases in groups(asked.backends, asked.params, asked.impls, asked.shapes, asked.lengths):
        able = _able(cases, record)
        if not able:
            continue
        group = run_group(able, effort, record.machine.sgemm_gflops)
        record.rows += group.rows
        record.failures += group.failures
        print("\n".join(line(row) for row in group.rows), flush=True)
        _progress(f"{able[0].shape} N={able[0].N} causal={able[0].causal}", began)
        if asked.json:
            record.write(asked.json)
    if record.rows:
        print(f"\n{growth_table(growths(record.rows))}")


def _decode(asked: Options, record: Record) -> None:
    budget = Budget(asked.seconds, max_rounds=MAX_ROUNDS)
    print(f"\nDecode: one query over M keys, impl torch\n\n{decode_header()}")
    began = perf_counter()
    for cases in groups(asked.backends, asked.params, ["torch"], asked.shapes, asked.decode_lengths):
        able = [case for case in cases if why_no_decode(case) is None]
        if not able:
            continue
        for row in run_decode(able, asked.inputs, budget):
            record.decode.append(row)
            print(decode_line(row), flush=True)
        _progress(f"decode {able[0].shape} M={able[0].N}", began)


def _edges(asked: Options, record: Record) -> None:
    print(f"\nTime against edges: random clusters of growing probabilities, impl torch\n\n{edge_header()}")
    began = perf_counter()
    for cases in groups(asked.backends, asked.params, ["torch"], asked.shapes, [asked.edges_length]):
        able = edge_cases(cases)
        if not able:
            continue
        for row in run_edges(able, _effort(asked)):
            record.edges.append(row)
            print(edge_line(row), flush=True)
        _progress(f"edges {able[0].shape} N={able[0].N} causal={able[0].causal}", began)
    print(f"\n{edge_growth_list(edge_growths(record.edges))}")


def _effort(asked: Options) -> Effort:
    return Effort(asked.seconds, asked.max_rounds, asked.flex_at, asked.inputs)


def _able(cases: Sequence[Case], record: Record) -> list[Case]:
    """The cases that run; the others are told with their reason."""
    reasons = [(case, why_not(case)) for case in cases]
    record.left_out += [
        LeftOut(case.backend, case.impl, case.told_params, case.shape, case.N, case.causal, reason)
        for case, reason in reasons
        if reason
    ]
    return [case for case, reason in reasons if reason is None]


def _progress(told: str, began: float) -> None:
    print(f"{perf_counter() - began:6.0f} s  {told} done", file=sys.stderr, flush=True)


def _finish(asked: Options, record: Record) -> None:
    if record.left_out:
        print(f"\n{left_out_list(record.left_out)}")
    if record.failures:
        print("\nFailed:\n" + "\n".join(f"- {each}" for each in record.failures), file=sys.stderr)
    if asked.json:
        record.write(asked.json)
    if asked.plot and record.rows:
        plot(record.rows, record.machine, asked.plot)


if __name__ == "__main__":
    sys.exit(main())
