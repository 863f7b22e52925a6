"""``longreach compare FILE``: one document under several attentions on a running server, as a table, as JSON
or as a plot of error against time."""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from service.cli_compare_table import notes, table
from service.settings import ConfigError

AUTO = "auto"
"""What it takes stands beside its name: it has no params."""
URL = "http://127.0.0.1:8000"
MAX_TIMEOUT_S = 86_400
LADDER = (
    "window:window=256",
    "window:window=1024",
    "sinks:window=1024",
    "bigbird",
    "vertical_slash",
    "pooled:budget=256",
    "pooled:budget=1024",
    "xattention:budget=256",
    "xattention:budget=1024",
)
"""What is compared where nothing is named: of each family a cheap setting and a dear one."""
_SPECS = (
    "NAME, NAME:PARAM=VALUE,PARAM=VALUE, auto:max_error=0.1, or the JSON of a spec; may be repeated. "
    "Without it: " + " ".join(LADDER) + ", those of them that the model can run"
)

Json = dict[str, Any]


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="a text in UTF-8; - for standard input")
    command.add_argument("--model", metavar="NAME", help="needed where the server has several models")
    command.add_argument("--url", default=URL, help=f"the server [default: {URL}]")
    command.add_argument("--attention", metavar="SPEC", nargs="+", action="extend", help=_SPECS)
    command.add_argument(
        "--timeout-s",
        type=seconds,
        default=600.0,
        metavar="S",
        help="for the whole comparison [default: 600]",
    )
    command.add_argument(
        "--truncate", choices=("start", "end"), help="cut what the model cannot read there [default: refuse]"
    )
    command.add_argument("--no-verify", action="store_true", help="do not measure errors")
    command.add_argument("--no-timing", action="store_true", help="do not time: takes half as long")
    command.add_argument("--json", action="store_true", help="the server's answer instead of the table")
    command.add_argument(
        "--plot", metavar="FILE", type=Path, help="error against time, as PNG, SVG or PDF (needs matplotlib)"
    )


def seconds(text: str) -> float:
    """An option's value. ArgumentTypeError where no server could wait so long."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0.001 <= found <= MAX_TIMEOUT_S:
        detail = f"{text!r} is no number of seconds from 0.001 to {MAX_TIMEOUT_S:,} (a day)"
        raise argparse.ArgumentTypeError(detail)
    return found


def run(options: argparse.Namespace, api_key: str | None) -> int:
    """ConfigError says what is wrong and what to do."""
    if options.plot is not None:
        _check_plot(options)
    server = Server(options.url, api_key, options.timeout_s)
    text = read_text(options.file)
    asked = options.attention or ladder_of(server, options.model)
    answer = server.post("/v1/compare", body_of(options, text, [parse_spec(each) for each in asked]))
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        print(table(answer, asked))
        print("\n".join(notes(answer, asked)))
    if options.plot is not None:
        from service.cli_compare_plot import write

        write(answer, asked, options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0


def body_of(options: argparse.Namespace, text: str, specs: Sequence[str | Json]) -> Json:
    body: Json = {"input": text, "attention": list(specs), "timing": not options.no_timing}
    body["timeout_ms"] = max(int(options.timeout_s * 1000), 1)
    for name in ("model", "truncate"):
        if (value := getattr(options, name)) is not None:
            body[name] = value
    return {**body, "verify": False} if options.no_verify else body


def parse_spec(text: str) -> str | Json:
    """``NAME``, ``NAME:PARAM=VALUE,...`` or JSON, as the request's spec. What it names the server checks."""
    if text.lstrip().startswith("{"):
        try:
            found: Json = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--attention {text!r} is not valid JSON: {error}") from None
        return found
    name, colon, rest = text.partition(":")
    if not colon:
        return name
    given = dict(_param(each, text) for each in rest.split(","))
    return {"backend": name, **given} if name == AUTO else {"backend": name, "params": given}


def _param(text: str, whole: str) -> tuple[str, Any]:
    """Values are JSON where they can be (512, 0.9, true), else words."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals and value):
        raise ConfigError(
            f"--attention {whole!r}: {text!r} is not PARAM=VALUE; write NAME:PARAM=VALUE,PARAM=VALUE, or "
            "JSON where a value is a list"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def read_text(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start})") from None


def ladder_of(server: Server, model: str | None) -> list[str]:
    """The default ladder as far as the model can run it; all of it where the server must say which model."""
    cards = [card for card in server.get("/v1/models").get("data", []) if model in (None, card["id"])]
    if len(cards) != 1:
        return list(LADDER)
    return [text for text in LADDER if text.partition(":")[0] in cards[0]["backends"]]


class Server:
    """Longreach over HTTP. ConfigError where it cannot be reached or refuses."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"--url {url!r} is no address of a server, as {URL} is")
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s + 30  # the server's own deadline comes first
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> Json:
        return self._ask(urllib.request.Request(self._url + path, headers=self._headers))

    def post(self, path: str, body: Mapping[str, Any]) -> Json:
        data = json.dumps(body).encode("utf-8")
        return self._ask(urllib.request.Request(self._url + path, data, self._headers, method="POST"))

    def _ask(self, request: urllib.request.Request) -> Json:
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return self._read(response.read())
        except urllib.error.HTTPError as error:
            raise ConfigError(self._refusal(error)) from None
        except TimeoutError:
            raise ConfigError(f"{self._url} did not answer in time; raise --timeout-s") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error) or type(error).__name__
            raise ConfigError(
                f"no server answers at {self._url} ({reason}); start one with 'longreach serve' or "
                "'make serve', or name it with --url"
            ) from None

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        try:
            detail = self._read(error.read()).get("detail")
        except ConfigError:
            detail = None
        if error.code == 401:
            return f"{detail} Give it with --api-key or LONGREACH_API_KEY."
        told = detail if isinstance(detail, str) else "with no word why; is it Longreach?"
        return f"{self._url} refused ({error.code}): {told}"

    def _read(self, data: bytes) -> Json:
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"what answers at {self._url} is not Longreach: its answer is no JSON object")
        return found


def _check_plot(options: argparse.Namespace) -> None:
    """Before minutes are spent on what could not be drawn."""
    from service.cli_compare_plot import check

    if options.no_verify or options.no_timing:
        raise ConfigError("--plot draws error against time: leave out --no-verify and --no-timing")
    check(options.plot)
