"""``longreach calibrate MODEL TEXT ...``: measure the profile that ``auto`` chooses attention by."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.settings import ConfigError, Settings, resolved

if TYPE_CHECKING:
    from models.calibrate import Sizes, Source
    from models.calibrate_ladders import Calibration
    from models.profile import Profile
    from models.quality_contenders import Contender
    from models.runner import Model


def add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="as for serve: a demo model, or NAME=PATH_OR_ID")
    add("texts", nargs="+", type=Path, metavar="TEXT", help="files in UTF-8, like what the model will read")
    add("--tokens", type=_positive, nargs="+", metavar="N", help="lengths [default: 512 1024 2048 4096 8192]")
    add("--documents", type=_positive, metavar="N", help="at each length, from all texts [default: 8]")
    add("--minutes", type=float, metavar="M", help="leave out documents that would take longer than this")
    add("--quick", action="store_true", help="as at first use: few rungs, 2 documents, 3 minutes")
    add("--rungs", metavar="JSON", help='instead of the usual ones: {"sinks": [{"window": 512}], ...}')
    add("--seed", type=int, default=0, help="of random attention [default: 0]")
    add(
        "--check",
        action="store_true",
        help="also plan each text's documents by the other texts alone, and tell what they would have lost",
    )
    add("--out", type=Path, metavar="FILE", help="where to write [default: beside the models in the cache]")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """ConfigError says what is wrong and what to do."""
    from models.contract import ModelError

    sources = [_read(file) for file in options.texts]
    if options.check and len(sources) < 2:
        raise ConfigError("--check plans each text by the others: give two texts or more")
    try:
        model = _load(options.model, settings)
        measured = _calibrate(model, sources, options)
        profile = measured.profile()
        file = _write(profile, options.out, settings)
    except (ModelError, ValueError) as error:
        raise ConfigError(str(error)) from None
    print(summary(profile))
    if options.check:
        print("\n" + checked(measured))
    print(f"profile: {file}")
    return 0


def summary(profile: Profile) -> str:
    """What the profile promises: predicted time to first token over exact's, by budget and length."""
    from models.auto import plan
    from service.cli import table_lines

    rows = []
    for length in profile.lengths:
        plans = [plan(profile, length.tokens, budget) for budget in BUDGETS]
        shown = ["exact" if each.is_exact else f"{each.time_share:.2f}" for each in plans]
        rows.append([length.tokens, length.documents, *shown])
    return "\n".join(table_lines(["TOKENS", "DOCUMENTS", *(f"MAX_ERROR {each}" for each in BUDGETS)], rows))


def checked(measured: Calibration) -> str:
    """What plans made without a text would have done to its documents, as a table."""
    from models.auto_check import check
    from service.cli import table_lines

    rows = [
        [
            row.tokens,
            row.max_error,
            row.layer_documents,
            f"{100 * row.within:.1f} %",
            f"{100 * row.far_above:.1f} %",
            f"{100 * row.exact:.0f} %",
            f"{row.worst:.2f}",
            f"{row.density:.2f}",
            f"{row.attention_share:.2f}",
            f"{row.time_share:.2f}",
        ]
        for row in check(measured, BUDGETS)
    ]
    return "\n".join(table_lines(_CHECKED, rows))


BUDGETS = (0.05, 0.1, 0.2)
_CHECKED = (
    "TOKENS",
    "MAX_ERROR",
    "LAYER-DOCUMENTS",
    "WITHIN",
    "ABOVE 1.5X",
    "EXACT",
    "WORST / BUDGET",
    "DENSITY",
    "ATTENTION",
    "TIME",
)


def _calibrate(model: Model, sources: Sequence[Source], options: argparse.Namespace) -> Calibration:
    from models.calibrate import calibrate

    return calibrate(
        model,
        sources,
        _rungs(model, options),
        sizes_of(options),
        command=command_of(options),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        progress=_tell,
    )


def _rungs(model: Model, options: argparse.Namespace) -> list[Contender]:
    from models.calibrate_rungs import asked_rungs, default_rungs

    if options.rungs is not None:
        return asked_rungs(model, options.rungs)
    return default_rungs(model, quick=options.quick)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """What was asked for, over the usual or the quick sizes."""
    from dataclasses import replace

    from models.calibrate import QUICK, Sizes

    if options.minutes is not None and not options.minutes > 0:
        raise ConfigError(f"--minutes must be above 0, got {options.minutes}")
    asked = {
        "lengths": tuple(options.tokens) if options.tokens else None,
        "documents": options.documents,
        "minutes": options.minutes,
        "seed": options.seed,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return replace(QUICK if options.quick else Sizes(), **given)


def command_of(options: argparse.Namespace) -> str:
    """The command as it can be given again; of a file its name alone."""
    words = ["longreach calibrate", shlex.quote(options.model), *(shlex.quote(f.name) for f in options.texts)]
    words += ["--tokens", *map(str, options.tokens)] if options.tokens else []
    for name in ("documents", "minutes", "rungs"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name}", shlex.quote(str(value))]
    words += ["--quick"] if options.quick else []
    words += ["--seed", str(options.seed)] if options.seed else []
    return " ".join(words)


def _load(named: str, settings: Settings) -> Model:
    from models.runner import Model
    from service.loading import load_models

    (model,) = load_models(resolved(settings.model_copy(update={"models": (named,)})), _tell).values()
    assert isinstance(model, Model)
    return model


def _read(file: Path) -> Source:
    from models.calibrate import Source

    try:
        return Source(file.name, file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as UTF-8 text: {error}") from None


def _write(profile: Profile, out: Path | None, settings: Settings) -> Path:
    from models.files import default_cache_dir
    from models.profile import profile_file, save

    file = out or profile_file(settings.cache_dir or default_cache_dir(), profile.stamp)
    try:
        save(profile, file)
    except OSError as error:
        raise ConfigError(f"--out: {file} cannot be written: {error}") from None
    return file


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
