"""Settings: flags, then environment, then file, then defaults; wrong ones are named with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service import cli
from service.app import create_app
from service.machine import memory_bytes
from service.settings import ConfigError, Settings, flag_name, load_settings, parse_model, resolved


def test_flags_win_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "longreach.toml"
    file.write_text('port = 1001\nhost = "10.0.0.1"\nmax_running = 7\nmodels = ["a=x"]\n')
    monkeypatch.setenv("LONGREACH_CONFIG", str(file))
    monkeypatch.setenv("LONGREACH_PORT", "1002")
    monkeypatch.setenv("LONGREACH_MODELS", "b=y, smollm2-135m")
    found = load_settings({"host": "10.0.0.3"})
    assert (found.host, found.port, found.max_running, found.step_tokens) == ("10.0.0.3", 1002, 7, 1024)
    assert found.models == ("b=y", "smollm2-135m")
    assert load_settings({"port": 1003}).port == 1003
    assert load_settings({}, config=str(file)).models == ("b=y", "smollm2-135m")
    monkeypatch.delenv("LONGREACH_MODELS")
    assert load_settings().models == ("a=x",)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().port = 1  # type: ignore[misc]


def test_every_setting_has_a_flag_whose_help_names_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in Settings.model_fields:
        assert flag_name(name) in text and f"LONGREACH_{name.upper()}" in text, name


def test_flags_reach_the_settings() -> None:
    arguments = [
        "serve",
        "--model",
        "a=x",
        "--model",
        "b=y",
        "--port",
        "9",
        "--no-metrics-public",
        "--profile",
        "32k",
    ]
    found = cli.settings_of(cli.parser().parse_args(arguments))
    assert found.models == ("a=x", "b=y") and found.port == 9
    assert found.metrics_public is False and found.profile == "32k"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "70000"}, "port (--port, LONGREACH_PORT)"),
        ({"port": "abc"}, "LONGREACH_PORT"),
        ({"models": ["a=x", "a=y"]}, "given twice"),
        ({"models": ["/some/path"]}, "NAME=/some/path"),
        ({"models": ["=x"]}, "NAME=PATH_OR_ID"),
        ({"device": "tpu"}, "--device"),
        ({"prefill_chunk_tokens": 4096}, "must not exceed step_tokens"),
        ({"prefill_chunk_tokens": 127}, "--prefill-chunk-tokens"),
        ({"step_tokens": 127, "prefill_chunk_tokens": 128}, "--step-tokens"),
        ({"max_running": 1024, "step_tokens": 512}, "must not exceed step_tokens"),
        ({"api_key": "two words"}, "--api-key"),
        ({"timeout_s": "nan"}, "--timeout-s"),
        ({"drain_seconds": "-1"}, "--drain-seconds"),
        ({"memory_limit_bytes": "0"}, "--memory-limit-bytes"),
        ({"step_ms": "0"}, "--step-ms"),
        ({"short_ms": "nan"}, "--short-ms"),
        ({"short_weight": "0"}, "--short-weight"),
        ({"max_queue_seconds": "-1"}, "--max-queue-seconds"),
        ({"prefix_cache_bytes": "-1"}, "--prefix-cache-bytes"),
        ({"watchdog_s": "0"}, "--watchdog-s"),
        ({"admin": "perhaps"}, "--admin"),
        ({"admin": True, "host": "0.0.0.0"}, "--api-key"),
        ({"admin": True, "host": "::"}, "lets anybody load and unload models"),
        ({"admin": True, "host": "server.example"}, "--admin"),
    ],
)
def test_wrong_settings_are_named(flags: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags)
    assert words in str(caught.value)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings({}, config=str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("port = ")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings({}, config=str(broken))
    broken.write_text("prot = 1")
    with pytest.raises(ConfigError, match="unknown settings: prot"):
        load_settings({}, config=str(broken))


def test_the_key_shows_in_no_text_of_the_settings() -> None:
    found = load_settings({"api_key": "s3cret"})
    assert "s3cret" not in repr(found) and "s3cret" not in found.model_dump_json()


def test_models_are_named_or_demo_models() -> None:
    assert parse_model("a=b=c") == ("a", "b=c")
    assert parse_model("smollm2-135m") == ("smollm2-135m", "smollm2-135m")
    assert parse_model("m@v1=/x y/z") == ("m@v1", "/x y/z")


def test_memory_is_what_the_machine_or_its_control_group_has() -> None:
    assert 1 << 28 < memory_bytes("cpu") < 1 << 50
    assert load_settings().memory_limit == memory_bytes("cpu") // 2
    assert load_settings({"memory_limit_bytes": 5}).memory_limit == 5


@pytest.mark.parametrize(
    "flags",
    [
        {"host": "127.0.0.1"},
        {"host": "127.9.9.9"},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "api_key": "k"},
    ],
)
def test_admin_routes_are_for_this_machine_or_for_who_has_the_key(flags: dict[str, str]) -> None:
    assert load_settings({"admin": True, **flags}).admin


def test_the_prefix_cache_is_an_eighth_of_the_memory_limit_unless_it_is_said() -> None:
    assert load_settings({"memory_limit_bytes": 800}).prefix_cache == 100
    assert load_settings({"memory_limit_bytes": 800, "prefix_cache_bytes": 0}).prefix_cache == 0


def test_a_home_directory_in_the_cache_dir_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LONGREACH_CACHE_DIR", "~/models")
    assert load_settings().cache_dir == tmp_path / "models"
    assert load_settings({"cache_dir": "~/other"}).cache_dir == tmp_path / "other"


def see_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("count", "found"), [(0, "cpu"), (1, "cuda")])
def test_the_device_by_default_is_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, count: int, found: str
) -> None:
    see_devices(monkeypatch, count)
    assert load_settings().device == "auto"
    assert resolved(load_settings()).device == found
    assert resolved(load_settings({"device": "cpu"})).device == "cpu"


@pytest.mark.parametrize(("count", "device"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_device_that_is_not_there_is_one_message_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, count: int, device: str
) -> None:
    from service import server

    see_devices(monkeypatch, count)
    with pytest.raises(ConfigError, match=f"--device.*torch sees {count} CUDA devices"):
        server.serve(load_settings({"device": device, "port": 0}))


def test_the_device_that_auto_means_is_what_metrics_name(monkeypatch: pytest.MonkeyPatch) -> None:
    see_devices(monkeypatch, 0)
    app = create_app(load_settings({"memory_limit_bytes": 7}), {})
    text = app.state.runtime.metrics.render("")[0].decode()
    assert 'longreach_memory_limit_bytes{device="cpu"} 7.0' in text and 'device="auto"' not in text


def test_the_other_kernels_distribution_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from service import server

    class Found:
        version = "0.19.0"

    monkeypatch.setattr(server, "distribution", lambda name: Found())
    with pytest.raises(ConfigError, match="pip uninstall kernels"):
        server.refuse_other_kernels()

    def none(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(server, "distribution", none)
    server.refuse_other_kernels()


def test_backends_models_and_version_print_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def output(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        assert caught.value.code == 0
        return capsys.readouterr().out

    table = output("backends")
    assert "BACKEND" in table and "bigbird" in table and "window=512" in table
    models = output("models", "--cache-dir", str(tmp_path))
    assert "smollm2-135m" in models and "nomic-embed-v1.5" in models and str(tmp_path) in models
    assert output("version").startswith("longreach 0")


def test_mistakes_on_the_command_line_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["serve", "--port", "x"], ["fetch", "no-such-model"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("longreach: error: ") and "Traceback" not in told
