"""How honest the measured error of a request is.

    python -m models.verify_study --json verify.json --markdown docs/verify.md

A decoder and an encoder read a real text with exact attention; in some of their layers every backend's error
is computed on every row. From then on no attention is needed: the served sampling is drawn hundreds of times
from those rows, and what it says is held against what is true. Then faults are planted, and counted how
often the figures show them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch

from models.contract import ModelError
from models.files import default_cache_dir
from models.loader import load_model
from models.quality_contenders import Contender, refuse_cut_tiles, refuse_unsupported
from models.quality_options import context_of
from models.quality_record import LayerRecord, record_layers
from models.quality_run import guarded, tell
from models.quality_texts import novel, passages_of
from models.runner import Model
from models.verify_study_decode import DecodeRow, measure_decode
from models.verify_study_faults import FaultRow, measure_faults
from models.verify_study_figures import SettingRow, setting_row
from models.verify_study_options import FAULTY, Sizes, read_options, settings_of, sizes_of
from models.verify_study_replay import draw, replay
from models.verify_study_report import markdown
from models.verify_study_rows import RowLosses, row_losses


@dataclass
class Study:
    """What was measured, and where. ``settings`` decide what the figures mean."""

    settings: dict[str, Any]
    context: dict[str, Any]
    rows: list[SettingRow] = field(default_factory=list)
    faults: list[FaultRow] = field(default_factory=list)
    decode: list[DecodeRow] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, read_options(argv))


def run(options: argparse.Namespace) -> None:
    began = perf_counter()
    options.text = options.text or novel(default_cache_dir(), tell)
    sizes = sizes_of(options)
    study = Study({**asdict(sizes), "text": options.text.name}, context_of(options))
    for name, causal in ((options.decoder, True), (options.encoder, False)):
        _measure(study, name, causal, sizes, options)
    study.context["seconds"] = round(perf_counter() - began)
    _write(study, options)


def _write(study: Study, options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps(asdict(study), indent=1) + "\n", encoding="utf-8")
    page = markdown(study.settings, study.context, study.rows, study.faults, study.decode)
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    else:
        print(page)


def _measure(study: Study, name: str, causal: bool, sizes: Sizes, options: argparse.Namespace) -> None:
    """One model: true errors with every thread, then draws with one, for they are many and tiny."""
    contenders = settings_of(options, causal)
    by_setting = _losses(name, causal, contenders, sizes, options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for each, layers in zip(contenders, by_setting, strict=True):
            if layers:
                _replay(study, name, causal, each, layers, sizes)
            else:
                tell(f"{name}: {each.label}: errs nowhere, so nobody looks at its rows")
    finally:
        torch.set_num_threads(threads)


def _replay(
    study: Study, name: str, causal: bool, its: Contender, layers: Sequence[RowLosses], sizes: Sizes
) -> None:
    """Faults are planted in the first setting of a backend that is to have them."""
    new = all((row.model, row.backend) != (name, its.backend) for row in study.rows)
    drawn = [[draw(losses, None, seed) for seed in range(sizes.seeds)] for losses in layers]
    draws = [replay(losses, rows) for losses, rows in zip(layers, drawn, strict=True)]
    study.rows.append(setting_row(name, its, draws))
    if new and its.backend in FAULTY:
        study.faults += measure_faults(name, its, draws, [rows[: sizes.fault_seeds] for rows in drawn])
        if causal:
            study.decode += measure_decode(name, its, layers, sizes.fault_seeds)
    tell(f"{name}: {its.label}: true error {study.rows[-1].error:.4f}, {len(layers)} layers replayed")


def _losses(
    name: str, causal: bool, contenders: Sequence[Contender], sizes: Sizes, options: argparse.Namespace
) -> list[list[RowLosses]]:
    """For every contender the true errors of all rows of the layers in which it errs: of others a server
    looks at no rows."""
    chunk_tokens = sizes.chunk_tokens if causal else 0
    refuse_cut_tiles(contenders, chunk_tokens)
    records = _records(name, causal, contenders, sizes, options)
    tell(f"{name}: errors of all rows in layers {', '.join(str(each.index) for each in records)}")
    by_layer = [row_losses(record, contenders, chunk_tokens, seed=0) for record in records]
    return [[each for each in its if each.error > 0] for its in zip(*by_layer, strict=True)]


def _records(
    name: str, causal: bool, contenders: Sequence[Contender], sizes: Sizes, options: argparse.Namespace
) -> list[LayerRecord]:
    model = load_model(name, name, progress=tell)
    assert isinstance(model, Model)
    if model.info.causal != causal:
        raise ModelError(f"{name!r} is no {'decoder' if causal else 'encoder'}")
    refuse_unsupported(model, contenders)
    text, prefix = options.text.read_text(encoding="utf-8"), model.info.prompts.get("document", "")
    tokens, chunk_tokens = (sizes.tokens, sizes.chunk_tokens) if causal else (sizes.encoder_tokens, 0)
    (passage,) = passages_of(text, model.tokenizer, prefix, tokens, 1, options.text.name)
    applied = model.info.applied_layers
    step = -(-len(applied) // sizes.layers)
    return record_layers(model._network, passage.token_ids, applied[::step], chunk_tokens)


if __name__ == "__main__":
    sys.exit(main())
