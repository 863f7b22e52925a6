"""``auto`` on the demo decoder, from its first use on: the profile is measured, the budget kept, the plan
replayed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Server
from tests.e2e.test_demo_models import DECODER, ids

pytestmark = [pytest.mark.demo, pytest.mark.slow]

BUDGET = 0.2


@pytest.mark.timeout(900)
def test_a_budget_is_kept_from_the_first_use_on_and_its_plan_replayed(server: Server, long_text: str) -> None:
    prompt = ids(server, DECODER, long_text)[:1600]

    def generate(attention: dict[str, Any]) -> dict[str, Any]:
        body = {
            "model": DECODER,
            "prompt": {"token_ids": prompt},
            "max_new_tokens": 8,
            "attention": attention,
        }
        return server.post("/v1/generate", body)

    asked = {"backend": "auto", "max_error": BUDGET}
    first = generate(asked | {"verify": {"rows": "all"}})
    told = first["attention"]
    assert told["used"] == "auto" and told["plan_reason"] in ("chosen", "below the crossover")
    assert len(told["plan"]) == 30
    if told["plan_reason"] == "chosen":
        assert told["density"] < 0.9 and told["budget"]["rows"] > 0
    assert told["budget"]["within"] and told["budget"]["estimate"] <= BUDGET
    # All rows, each layer on its own: sampling may let a layer through, not far.
    assert told["measured_error"]["estimate"] <= 1.5 * BUDGET
    cards = server.get("/v1/models").json()["data"]
    assert {card["id"]: card["auto"]["state"] for card in cards}[DECODER] == "ready"

    again = generate(asked)
    assert again["attention"]["plan"] == told["plan"] and again["choices"] == first["choices"]
    replay = generate({"backend": "auto", "plan": told["plan"]})
    assert replay["attention"]["plan_reason"] == "replayed" and replay["choices"] == first["choices"]
