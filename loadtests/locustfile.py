"""Load test of a Longreach server: mixed lengths, every endpoint, every attention backend its models can run.

    make load HOST=http://127.0.0.1:8000 USERS=8 RUN_TIME=60s
    python -m locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:8000 -u 8 -t 60s

80 % of the documents are short (up to 512 tokens), 15 % medium (up to 8,192), 5 % long (up to the model's
limit). Requests are named by endpoint, length class and backend ("generate short [window]"), so that
percentiles of unlike work never mix. ``--arrival-rate`` sends them at Poisson times whether or not earlier
ones were answered: a closed loop of waiting users hides overload. The exit code is 1 where a request failed,
none was answered or some were unanswered at the end (``--stop-timeout`` waits for them, ``--max-unanswered``
allows some), 2 where the run could not begin. 429 with Retry-After is back-pressure and counted apart;
without it, it is a failure. Users are dealt to the endpoints in turn: fewer than three leave some out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Pool
from locust import FastHttpUser, constant, events, task
from locust.env import Environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when started from elsewhere

from loadtests.answers import read_outcome, retry_after_s
from loadtests.documents import Library
from loadtests.options import add_options, split
from loadtests.report import Key, Outcome
from loadtests.run import Run
from loadtests.server import Server, ServerProblem, body_of, discover

DEFAULT_RUN_TIME_S = 60
MAX_PAUSE_S = 30.0
FAILURE_PAUSE_S = 0.5


@events.init_command_line_parser.add_listener
def options(parser: argparse.ArgumentParser) -> None:
    add_options(parser)


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Ask the server what it offers; keep the users that have something to do there."""
    options = environment.parsed_options
    if options.headless and not options.run_time:
        options.run_time = DEFAULT_RUN_TIME_S  # a load test ends by itself
    try:
        run = _discover_run(environment, options)
    except (ServerProblem, OSError, ValueError) as problem:
        print(f"load test: {problem}", file=sys.stderr)
        sys.exit(2)
    LongDocumentUser.run_ = run
    LongDocumentUser.network_timeout = LongDocumentUser.connection_timeout = options.request_timeout
    OpenLoopUser.concurrency = options.max_in_flight
    wanted = [OpenLoopUser] if options.arrival_rate > 0 else [EncodeUser, GenerateUser, ScoreUser]
    environment.user_classes[:] = [each for each in wanted if each.endpoint in (None, *run.endpoints)]


def _discover_run(environment: Environment, options: argparse.Namespace) -> Run:
    server = Server(environment.host or "http://127.0.0.1:8000", options.api_key, options.request_timeout)
    server.wait_until_ready(options.wait_ready, gevent.sleep)
    library = Library.from_samples()
    targets = discover(
        server,
        library.cut(2000, random.Random(0)),
        endpoints=split(options.endpoints),
        models=split(options.models),
        backends=split(options.backends),
    )
    return Run(options, server, targets, library)


@events.test_start.add_listener
def begin(**_: Any) -> None:
    LongDocumentUser.run_.begin()


@events.test_stopping.add_listener
def stop(**_: Any) -> None:
    LongDocumentUser.run_.stop()


@events.test_stop.add_listener
def end(**_: Any) -> None:
    LongDocumentUser.run_.end()


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    run = LongDocumentUser.run_
    if run.options.report_file:
        text = json.dumps(run.report.as_json(run.duration_s), indent=2)
        Path(run.options.report_file).write_text(text + "\n", encoding="utf-8")
    environment.process_exit_code = 0 if run.report.passed else 1


@events.quit.add_listener
def summarise(**_: Any) -> None:
    """Last of all, below locust's own tables."""
    print(LongDocumentUser.run_.report.render(LongDocumentUser.run_.duration_s), flush=True)


class LongDocumentUser(FastHttpUser):
    """One request: draw it, send it, check the answer, record it."""

    abstract = True
    endpoint: str | None = None
    """The endpoint that this user loads; None: any."""
    run_: Run

    def ask(self) -> float:
        """Send one request; returns the seconds to wait before the next. Nothing once the run is stopping:
        locust ends users that wait, and one that wakes up meanwhile would be cut off in its request."""
        run = self.run_
        if run.stopping:
            return FAILURE_PAUSE_S
        target, length, backend, text = run.draw(self.endpoint)
        key = Key(target.endpoint, target.model, length.name, backend)
        body = body_of(target.endpoint, target.model, text, backend, run.options.max_new_tokens)
        run.report.started += 1
        outcome, pause_s = self._send(key, body)
        run.report.add(key, outcome)
        target.observe(len(text), outcome.input_tokens)
        return FAILURE_PAUSE_S if outcome.verdict == "failed" else pause_s

    def _send(self, key: Key, body: dict[str, Any]) -> tuple[Outcome, float]:
        name = self._name(key)
        stream = key.endpoint == "generate"
        started = time.perf_counter()
        with self.client.post(
            f"/v1/{key.endpoint}",
            json=body | ({"stream": True} if stream else {}),
            headers=self.run_.headers | ({"Accept": "text/event-stream"} if stream else {}),
            name=name,
            stream=stream,
            catch_response=True,
        ) as response:
            outcome = read_outcome(key, response, started)
            response.request_meta["response_time"] = outcome.total_ms
            if outcome.verdict in ("rejected", "refused"):  # their times are not those of answers
                response.request_meta["name"] = f"{name} {outcome.verdict}"
            if outcome.verdict == "failed":
                response.failure(outcome.reason)
            else:
                response.success()
            pause_s = retry_after_s(response) or 0.0
        self._fire_token_times(name, outcome)
        return outcome, pause_s

    def _name(self, key: Key) -> str:
        name = f"{key.endpoint} {key.length} [{key.backend}]"
        num_models = sum(each.endpoint == key.endpoint for each in self.run_.targets)
        return f"{name} {key.model}" if num_models > 1 else name

    def _fire_token_times(self, name: str, outcome: Outcome) -> None:
        times = [("ITL", each) for each in outcome.inter_token_ms]
        if outcome.time_to_first_token_ms is not None:
            times.append(("TTFT", outcome.time_to_first_token_ms))
        for kind, time_ms in times:
            self.environment.events.request.fire(
                request_type=kind,
                name=name,
                response_time=time_ms,
                response_length=0,
                exception=None,
                context={},
            )


class ClosedLoopUser(LongDocumentUser):
    """A caller that waits for its answer before it asks again, and as long as a 429 tells it to."""

    abstract = True
    pause_s = 0.0

    @task
    def ask_again(self) -> None:
        self.pause_s = min(self.ask(), MAX_PAUSE_S)

    def wait_time(self) -> float:
        return self.pause_s


class EncodeUser(ClosedLoopUser):
    endpoint = "encode"


class GenerateUser(ClosedLoopUser):
    endpoint = "generate"


class ScoreUser(ClosedLoopUser):
    endpoint = "score"


class OpenLoopUser(LongDocumentUser):
    """One source of Poisson arrivals over all endpoints, bounded by --max-in-flight."""

    fixed_count = 1
    wait_time = constant(0)

    def on_start(self) -> None:
        self._in_flight = Pool(self.run_.options.max_in_flight)

    @task
    def arrive(self) -> None:
        gevent.sleep(self.run_.random.expovariate(self.run_.options.arrival_rate))
        if self._in_flight.free_count():
            self._in_flight.spawn(self.ask)
        else:
            self.run_.report.not_sent += 1

    def on_stop(self) -> None:
        """Let what is in flight be answered, as long as --stop-timeout allows."""
        try:
            self._in_flight.join(timeout=self.environment.stop_timeout or 0)
        finally:
            self._in_flight.kill()
