"""``longreach diagnose FILE``: what a model's attention looks like on a text, as tables or as JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from service.cli_compare import URL, Server, parse_spec, read_text, seconds
from service.settings import ConfigError

Json = dict[str, Any]
LAYER_HEAD = (
    "LAYER", "ENTROPY", "OF LN", "KEYS 50%", "90%", "95%", "KEPT", "RANK/D", "SPARSE", "LOW-RANK", "BOTH",
    "RESIDUAL", "REGIME", "RECOMMENDED",
)  # fmt: skip
HEAD_HEAD = ("LAYER", "HEAD", *LAYER_HEAD[1:11], "REGIME", "RECOMMENDED")


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="a text in UTF-8; - for standard input")
    command.add_argument("--model", metavar="NAME", help="needed where the server has several models")
    command.add_argument("--url", default=URL, help=f"the server [default: {URL}]")
    command.add_argument("--layers", metavar="N,N,..", help="only these; else all that a choice applies to")
    command.add_argument("--support", metavar="SPEC", help="NAME, NAME:PARAM=VALUE or JSON: its kept mass")
    command.add_argument("--budget", type=int, metavar="KEYS", help="keys per row [default: 256]")
    command.add_argument("--tolerance", type=float, metavar="SHARE", help="misplaced mass [default: 0.1]")
    command.add_argument("--heads", action="store_true", help="a line for every head")
    command.add_argument("--timeout-s", type=seconds, default=600.0, metavar="S", help="[default: 600]")
    command.add_argument("--json", action="store_true", help="the server's answer instead of the tables")


def run(options: argparse.Namespace, api_key: str | None) -> int:
    """ConfigError says what is wrong and what to do."""
    server = Server(options.url, api_key, options.timeout_s)
    answer = server.post("/v1/diagnose", body_of(options))
    print(json.dumps(answer, indent=2) if options.json else told(answer, heads=options.heads))
    return 0


def body_of(options: argparse.Namespace) -> Json:
    body: Json = {"input": read_text(options.file), "timeout_ms": max(int(options.timeout_s * 1000), 1)}
    for name in ("model", "budget", "tolerance"):
        if (value := getattr(options, name)) is not None:
            body[name] = value
    if options.layers is not None:
        body["layers"] = _layers(options.layers)
    if options.support is not None:
        body["support"] = parse_spec(options.support)
    return body


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {text!r} is no list of numbers; write 0,5,11") from None


def told(answer: Json, *, heads: bool = False) -> str:
    """The answer as tables."""
    from service.cli import table_lines

    asked = answer["asked"]
    lines = [
        f"{answer['model']}, {answer['tokens']:,} tokens, {len(answer['rows'])} rows; budget "
        f"{asked['budget']} keys, tolerance {asked['tolerance']:g}, support {_short(asked['support'])}",
        "",
        *table_lines(LAYER_HEAD, [_layer(layer, answer) for layer in answer["layers"]]),
    ]
    if heads:
        rows = [_head(layer["layer"], head) for layer in answer["layers"] for head in layer["heads"]]
        lines += ["", *table_lines(HEAD_HEAD, rows)]
    lines += ["", *_candidates(answer), "", *_collapse(answer["rank_collapse"]), ""]
    bottlenecks = sum(head["low_rank_bottleneck"] for layer in answer["layers"] for head in layer["heads"])
    total = sum(len(layer["heads"]) for layer in answer["layers"])
    lines.append(f"low-rank bottleneck: {bottlenecks} of {total} heads use nearly all of head_dim")
    lines.append(f"regime: {answer['regime'] or 'none'}; {answer['reason']}")
    lines.append(f"recommended: {json.dumps(answer['recommended'])}")
    return "\n".join(lines)


def _layer(layer: Json, answer: Json) -> list[str]:
    """Means over its heads."""
    heads, collapse = layer["heads"], answer["rank_collapse"]["residuals"]
    residual = None if collapse is None else collapse[layer["layer"]]
    return [
        str(layer["layer"]),
        *(_number(_mean(heads, name), digits) for name, digits in (("entropy", 2), ("relative_entropy", 3))),
        *(_number(_mean_keys(heads, share), 0) for share in ("0.5", "0.9", "0.95")),
        *(_number(_mean(heads, name), 3) for name in ("kept_mass", "rank_ratio")),
        *_errors(layer["errors"]),
        _number(residual, 3),
        layer["regime"] or "-",
        _short(layer["recommended"]),
    ]


def _head(number: int, head: Json) -> list[str]:
    keys = head["keys_for_mass"]
    return [
        str(number),
        str(head["head"]),
        _number(head["entropy"], 2),
        _number(head["relative_entropy"], 3),
        *(_number(keys[share], 0) for share in ("0.5", "0.9", "0.95")),
        *(_number(head[name], 3) for name in ("kept_mass", "rank_ratio")),
        *_errors(head["errors"]),
        head["regime"] or "-",
        _short(head["recommended"]),
    ]


def _candidates(answer: Json) -> list[str]:
    """What ran on every layer: means."""
    from service.cli import table_lines

    together = list(zip(*(layer["candidates"] for layer in answer["layers"]), strict=True))
    rows = [
        [
            _number(_mean(same, "kept_mass"), 3),
            _number(_mean(same, "output_error"), 3),
            _number(_mean(same, "density"), 3),
            _short(same[0]["spec"]),
        ]
        for same in together
    ]
    return table_lines(("KEPT", "OUTPUT ERROR", "DENSITY", "CANDIDATE"), rows)


def _collapse(collapse: Json) -> list[str]:
    """The four arms layer by layer, and the paths."""
    from service.cli import table_lines

    arms, paths = collapse["arms"], collapse["paths"]
    if arms is None:
        return [f"arms: none ({collapse['arms_reason']})"]
    head = ("LAYER", *(arm["name"].upper() for arm in arms))
    values = zip(*(arm["residuals"] for arm in arms), strict=True)
    rows = [[str(i), *(_short_number(value, 2) for value in each)] for i, each in enumerate(values)]
    title = f"residual by arm, first {collapse['arm_tokens']} tokens (floor {collapse['residual_floor']:.1g})"
    lines = [title, *table_lines(head, rows), ""]
    if paths is None:
        return [*lines, f"paths: none ({collapse['paths_reason']})"]
    rows = [
        [str(p["length"]), *(_short_number(p[name], 3) for name in ("num_paths", "norm_share", "residual"))]
        for p in paths["lengths"]
    ]
    title = f"paths by length (attention and skips alone; sum off by {paths['sum_error']:.1g})"
    return [*lines, title, *table_lines(("LENGTH", "PATHS", "OF NORM", "RESIDUAL"), rows)]


def _errors(errors: Json | None) -> list[str]:
    return [_number(None if errors is None else errors[name], 3) for name in ("sparse", "low_rank", "both")]


def _mean(items: Any, name: str) -> float | None:
    known = [item[name] for item in items if item[name] is not None]
    return sum(known) / len(known) if known else None


def _mean_keys(heads: list[Json], share: str) -> float:
    return float(sum(head["keys_for_mass"][share] for head in heads)) / len(heads)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short_number(value: float | None, digits: int) -> str:
    """Null is what JSON has for a number that is none."""
    return "-" if value is None else f"{value:.{digits}g}"


_SHOWN = ("window", "budget", "num_verticals", "num_slashes", "num_features", "support")


def _short(spec: Json) -> str:
    """A backend and the params that matter most."""
    params = spec.get("params", {})
    kept = ", ".join(f"{name}={params[name]}" for name in _SHOWN if params.get(name) is not None)
    return f"{spec.get('backend') or spec['used']}({kept})" if kept else spec.get("backend") or spec["used"]
