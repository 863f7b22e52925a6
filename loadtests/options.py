"""What a run can be told, beside locust's own --host, --users, --run-time and --stop-timeout."""

from __future__ import annotations

import argparse

from loadtests.server import ENDPOINTS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to locust's parser (they also show in its web page)."""
    add = parser.add_argument
    add("--endpoints", default=",".join(ENDPOINTS), help="which of encode,generate,score to load")
    add("--models", default="", help="models, separated by commas (default: all that are served)")
    add("--backends", default="", help="attention backends, separated by commas (default: all that fit)")
    add("--max-input-tokens", type=int, default=0, help="longest document (default: the model's limit)")
    add("--max-new-tokens", type=int, default=32, help="tokens that each generate request asks for")
    add(
        "--arrival-rate",
        type=float,
        default=0.0,
        help="requests per second at Poisson times (0: closed loop)",
    )
    add("--max-in-flight", type=int, default=256, help="with --arrival-rate: requests in flight at the most")
    add("--request-timeout", type=float, default=600.0, help="seconds until a request counts as failed")
    add("--wait-ready", type=float, default=60.0, help="seconds to wait for /readyz before the run")
    add("--max-unanswered", type=int, default=0, help="requests that may still be in flight at the end")
    add("--report-file", default="", help="write the summary there as JSON")
    add("--load-seed", type=int, default=0, help="seed of lengths, texts, backends and arrival times")
    add("--api-key", default="", help="sent as Bearer token", env_var="LONGREACH_API_KEY", is_secret=True)


def split(text: str) -> list[str]:
    """The items of a comma-separated list."""
    return [each.strip() for each in text.split(",") if each.strip()]
