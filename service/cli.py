"""``longreach serve | models | fetch | backends | compare | diagnose | calibrate | bench | version``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from service.settings import ENV_PREFIX, ConfigError, Settings, flag_name, load_settings


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Errors of the caller are one message on stderr, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        _bench(arguments[1:])
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except ConfigError as error:
        print(f"longreach: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="longreach", description="Inference server for long documents.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="start the server", description=_PRECEDENCE)
    add_settings(serve)
    serve.set_defaults(run=_serve)
    models = commands.add_parser("models", help="list the demo models and whether they are here")
    add_settings(models, only=("cache_dir",))
    models.set_defaults(run=_models)
    fetch = commands.add_parser("fetch", help="fetch demo models without serving them")
    fetch.add_argument(
        "names", nargs="*", metavar="NAME", help="demo models; those of the profile by default"
    )
    add_settings(fetch, only=("profile", "source", "cache_dir"))
    fetch.set_defaults(run=_fetch)
    backends = commands.add_parser("backends", help="list the attention backends")
    add_backends(backends)
    backends.set_defaults(run=_backends)
    from service import cli_compare

    compare = commands.add_parser("compare", help="one document under several attentions, side by side")
    cli_compare.add_options(compare)
    add_settings(compare, only=("api_key",))
    compare.set_defaults(run=_compare)
    from service import cli_diagnose

    diagnose = commands.add_parser("diagnose", help="what a model's attention looks like on a text")
    cli_diagnose.add_options(diagnose)
    add_settings(diagnose, only=("api_key",))
    diagnose.set_defaults(run=_diagnose)
    from service import cli_calibrate

    calibrate = commands.add_parser("calibrate", help="measure the profile that auto chooses attention by")
    cli_calibrate.add_options(calibrate)
    add_settings(calibrate, only=("device", "dtype", "threads", "source", "cache_dir"))
    calibrate.set_defaults(run=_calibrate)
    commands.add_parser(
        "bench",
        help="time the attention backends (arguments go to kernels.bench); bench quality: what they lose",
        add_help=False,
    )
    commands.add_parser("version", help="print the version").set_defaults(run=_version)
    return top


_PRECEDENCE = (
    "Flags win over LONGREACH_* environment variables, these over the TOML file of --config "
    "(LONGREACH_CONFIG), that over the defaults."
)


def add_settings(command: argparse.ArgumentParser, only: Sequence[str] | None = None) -> None:
    """One flag per setting, its environment variable and default in the help."""
    command.add_argument("--config", metavar="FILE", help=f"TOML file of settings [env: {ENV_PREFIX}CONFIG]")
    for name, field in Settings.model_fields.items():
        if only is not None and name not in only:
            continue
        shown = "" if field.default in (None, ()) else f" [default: {field.default}]"
        text = f"{field.description} [env: {ENV_PREFIX}{name.upper()}]{shown}"
        options: dict[str, Any] = {"dest": name, "default": None, "help": text.replace("%", "%%")}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif name in ("models", "cors_origins"):
            options |= {"action": "append", "metavar": "NAME=PATH_OR_ID" if name == "models" else "ORIGIN"}
        elif get_origin(field.annotation) is Literal:
            options |= {"choices": get_args(field.annotation)}
        else:
            options["metavar"] = name.rsplit("_", 1)[-1].upper()
        command.add_argument(flag_name(name), **options)


def add_backends(command: argparse.ArgumentParser) -> None:
    command.add_argument("--markdown", action="store_true", help="as the table of the README")
    command.add_argument(
        "--conditions",
        action="store_true",
        help="what Yun et al.'s theory says of each mask: self loops, Hamiltonian path, s, pairs",
    )
    command.add_argument("--draw", metavar="DIR", help="draw the masks into DIR (needs matplotlib)")
    command.add_argument("--backend", metavar="NAME", help="only this one")
    command.add_argument("--params", metavar="JSON", help="its params; else the defaults, small ones to draw")
    command.add_argument(
        "--num-tokens",
        type=int,
        metavar="N",
        help="length [default: 1024; to draw, 256 or as many as it takes]",
    )
    command.add_argument("--json", action="store_true", help="the conditions as JSON")


def settings_of(options: argparse.Namespace) -> Settings:
    flags = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    return load_settings(flags, options.config)


def _serve(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    from service.server import leave, serve

    leave(serve(settings))
    raise AssertionError("unreachable")


def _models(options: argparse.Namespace) -> int:
    from models.files import default_cache_dir
    from service.catalogue_table import profiles, rows

    cache_dir = settings_of(options).cache_dir or default_cache_dir()
    print_table(("NAME", "DOWNLOAD", "HERE", "LICENCE", "SUMMARY"), rows(cache_dir))
    print(f"\ncache: {cache_dir}\nprofiles: {profiles()}")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from models.contract import ModelError
    from service.catalogue_table import fetch_all

    try:
        fetch_all(options.names, settings_of(options))
    except ModelError as error:
        raise ConfigError(str(error)) from None
    return 0


def _backends(options: argparse.Namespace) -> int:
    from service.backends_table import HEAD, rows, run

    if options.markdown:
        print(backends_markdown())
    elif options.conditions or options.draw:
        run(options, print_table)
    else:
        _refuse_idle(options)
        print_table(HEAD, rows())
    return 0


def _compare(options: argparse.Namespace) -> int:
    from service.cli_compare import run

    key = settings_of(options).api_key
    return run(options, None if key is None else key.get_secret_value())


def _diagnose(options: argparse.Namespace) -> int:
    from service.cli_diagnose import run

    key = settings_of(options).api_key
    return run(options, None if key is None else key.get_secret_value())


def _calibrate(options: argparse.Namespace) -> int:
    from service.cli_calibrate import run

    return run(options, settings_of(options))


def _refuse_idle(options: argparse.Namespace) -> None:
    """Options that say what to compute, where nothing is computed."""
    for flag in ("backend", "params", "num_tokens", "json"):
        if getattr(options, flag) is not (False if flag == "json" else None):
            raise ConfigError(f"{flag_name(flag)} needs --conditions or --draw DIR")


def backends_markdown() -> str:
    """The README's table of backends, made from the registry."""
    from service.backends_table import markdown

    return markdown()


def _bench(arguments: Sequence[str]) -> NoReturn:
    """This process becomes the bench: its signals and its exit status are then the bench's own."""
    module, rest = "kernels.bench", arguments
    if arguments[:1] == ["quality"]:
        module, rest = "models.quality_long", arguments[1:]
    os.execv(sys.executable, [sys.executable, "-m", module, *rest])


def _version(options: argparse.Namespace) -> int:
    from importlib.metadata import version

    print(
        f"longreach {version('longreach')} (torch {version('torch')}, transformers {version('transformers')})"
    )
    return 0


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print("\n".join(table_lines(head, rows)))


def table_lines(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns as wide as their widest cell; the last one runs free."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]
        ).rstrip()
        for line in lines
    ]


if __name__ == "__main__":
    main()
