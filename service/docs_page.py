"""A page that lists the OpenAPI file for reading, with nothing fetched from elsewhere."""

from __future__ import annotations

from importlib.resources import files


def page() -> str:
    return files("service").joinpath("ui/docs.html").read_text(encoding="utf-8")
