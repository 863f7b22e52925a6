"""The demo models themselves, fetched or skipped: sane perplexity, an answer, embeddings that find their
text."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from models.catalogue import DEMO_MODELS
from models.contract import ModelError, ServedModel, Slice
from models.fetch import fetched
from models.loader import default_cache_dir, load_model
from tests.models.tiny import choice, close

pytestmark = [pytest.mark.demo, pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test fetches

TEXT = Path(__file__).parents[2] / "samples" / "state-of-the-union-1902.txt"


@cache
def load(name: str) -> ServedModel | str:
    """The model, or why it cannot be had."""
    try:
        return load_model(name, name, progress=lambda _: None)
    except ModelError as error:
        if "could not be fetched" not in str(error):
            raise
        return str(error)


def demo(name: str) -> ServedModel:
    found = load(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def greedy(model: ServedModel, ids: list[int], limit: int) -> list[int]:
    state, chosen, current = model.open(len(ids) + limit), [], ids
    while len(chosen) < limit:
        logits = model.step([Slice(state, current, choice(), "logits", len(ids))]).results[0].logits
        assert logits is not None
        current = [int(logits.argmax())]
        if current[0] in model.info.eos_token_ids:
            break
        chosen += current
    state.close()
    return chosen


def embed(model: ServedModel, text: str) -> torch.Tensor:
    ids = model.tokenizer.encode(text).token_ids
    hidden = model.step([Slice(model.open(len(ids)), ids, choice(), "hidden", len(ids))]).results[0].hidden
    assert hidden is not None
    return torch.nn.functional.normalize(hidden.mean(0), dim=0)


def test_smollm2_reads_english_with_the_perplexity_of_a_working_model() -> None:
    model, text = demo("smollm2-135m"), TEXT.read_text()
    encoding = model.tokenizer.encode(text)
    ids = encoding.token_ids[:1025]
    scores = (
        model.step([Slice(model.open(1024), ids[:-1], choice(), "scores", 1024, ids[1:])]).results[0].scores
    )
    assert scores is not None
    num_bytes = len(text[encoding.char_spans[1][0] : encoding.char_spans[1024][1]].encode())
    assert 15 < math.exp(-float(scores.mean())) < 45
    assert 0.8 < -float(scores.sum()) / math.log(2) / num_bytes < 1.2


def test_smollm2_knows_the_capital_of_france() -> None:
    model = demo("smollm2-135m")
    prompt = model.tokenizer.chat(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    )
    ids = model.tokenizer.encode(prompt, special_tokens=False).token_ids
    assert model.tokenizer.decode(greedy(model, ids, 20)) == "The capital of France is Paris."


def test_smollm2_splits_numbers_into_digits_as_it_was_trained() -> None:
    tokenizer = demo("smollm2-135m").tokenizer
    assert [tokenizer.token_text(i) for i in tokenizer.encode("In 1902").token_ids] == [
        "In",
        " ",
        "1",
        "9",
        "0",
        "2",
    ]


@pytest.mark.parametrize("length", [512, 3000])
def test_nomic_finds_the_document_that_a_query_is_about(length: int) -> None:
    model = demo("nomic-embed-v1.5")
    prompts = model.info.prompts
    own = model.tokenizer.decode(
        model.tokenizer.encode(TEXT.read_text(), special_tokens=False).token_ids[: length - 8]
    )
    other = "The whale rose from the sea and broke the boat with one blow of its tail. " * 30
    query = embed(
        model, prompts["query"] + "What did the President tell Congress about trusts and tariffs in 1902?"
    )
    to_own = float(query @ embed(model, prompts["document"] + own))
    to_other = float(query @ embed(model, prompts["document"] + other))
    assert to_own > 0.5 and to_own > to_other + 0.1


def test_nomic_keeps_its_tokenizer_and_limit() -> None:
    model = demo("nomic-embed-v1.5")
    assert model.info.max_tokens == 8192 and model.info.pooling == "mean" and not model.info.causal
    encoding = model.tokenizer.encode("Whales!")
    assert encoding.token_ids == [101, 17967, 999, 102]
    assert encoding.char_spans == [(0, 0), (0, 6), (6, 7), (0, 0)]


def test_minilm_computes_what_transformers_computes() -> None:
    model = demo("minilm-l6")
    place = fetched(DEMO_MODELS["minilm-l6"], default_cache_dir())
    assert place is not None
    plain = AutoModel.from_pretrained(
        place.directory, attn_implementation="sdpa", local_files_only=True
    ).eval()
    ids = model.tokenizer.encode(TEXT.read_text()).token_ids[:512]
    with torch.no_grad():
        wanted = plain(input_ids=torch.tensor([ids])).last_hidden_state[0]
    got = model.step([Slice(model.open(512), ids, choice(), "hidden", 512)]).results[0].hidden
    assert close(got, wanted)
    assert model.info.pooling == "mean" and model.info.max_tokens == 512
