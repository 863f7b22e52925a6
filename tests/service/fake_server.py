"""``python -m tests.service.fake_server MODE ARGS...``: the real process over fake models.

MODE: ``fast``, ``slow`` (20 ms a step), ``broken`` (models that cannot be loaded), ``never`` (loading does
not end).
"""

from __future__ import annotations

import sys
import time

from models.contract import ModelError, ServedModel
from service import loading
from service.cli import parser, settings_of
from service.runtime import Runtime
from service.server import leave, serve
from service.settings import ConfigError, Settings
from tests.service.fake_model import decoder, encoder, slow


def load(mode: str) -> dict[str, ServedModel]:
    if mode == "broken":
        raise ModelError("model 'x' has only pytorch_model.bin; convert it to safetensors")
    if mode == "never":
        time.sleep(600)
    if mode == "crash":
        raise KeyError("surprise")
    hook = slow(0.02) if mode == "slow" else None
    return {"enc": encoder(on_step=hook), "dec": decoder(on_step=hook)}


def main() -> None:
    mode = sys.argv[1]

    async def start(runtime: Runtime) -> None:
        def load_fakes(settings: Settings) -> dict[str, ServedModel]:
            return load(mode)

        await loading.start(runtime, load_fakes)

    try:
        leave(serve(settings_of(parser().parse_args(["serve", *sys.argv[2:]])), start))
    except ConfigError as error:
        print(f"longreach: error: {error}", file=sys.stderr)
        leave(2)


if __name__ == "__main__":
    main()
