"""The tokenizer: whole texts, true spans, nothing cut or padded, the model's own chat template."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from models.contract import ModelError
from models.tokenizer import TextTokenizer, load_tokenizer
from tests.models.tiny import tokenizer_files

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    tokenizer_files(tmp_path, TEMPLATE)
    return load_tokenizer(tmp_path)


def test_a_text_longer_than_the_stored_truncation_is_encoded_whole_and_silently(
    tokenizer: TextTokenizer,
) -> None:
    text = "ABC " * 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoding = tokenizer.encode(text)
    assert len(encoding.token_ids) == len(encoding.char_spans) == 4000
    assert tokenizer.decode(encoding.token_ids) == text


def test_a_short_text_is_not_padded(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode("AB").token_ids) == 2 and tokenizer.encode("").token_ids == []


def test_spans_are_characters_also_where_one_character_takes_several_tokens(tokenizer: TextTokenizer) -> None:
    text = "A\u00e9\u20acB"
    encoding = tokenizer.encode(text)
    assert [text[a:b] for a, b in encoding.char_spans] == ["A", "é", "é", "€", "€", "€", "B"]


def test_a_token_that_is_no_text_shows_its_spelling(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("A é").token_ids
    assert [tokenizer.token_text(i) for i in ids] == ["A", " ", "Ã", "©"]
    assert tokenizer.token_text(1) == "<s>" and tokenizer.token_text(10_000) == ""


def test_special_tokens_are_kept_or_skipped_when_decoding(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode([1, *tokenizer.encode("AB").token_ids, 2]) == "AB"
    assert tokenizer.decode([1], skip_special_tokens=False) == "<s>"
    assert tokenizer.special_token_ids == (0, 1, 2) and tokenizer.eos_token_id == 2


def test_a_lone_surrogate_is_refused_in_words(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("A\ud800B")


def test_the_models_own_chat_template_is_applied(tokenizer: TextTokenizer) -> None:
    text = tokenizer.chat([{"role": "user", "content": "HI {{ 7 }}"}])
    assert text == "<s>user: HI {{ 7 }}</s><s>assistant: "


def test_a_template_that_refuses_says_why(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="refused the messages: no such role"):
        tokenizer.chat([{"role": "bad", "content": "x"}])


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    tokenizer_files(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="refused the messages"):
        load_tokenizer(tmp_path).chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ 1 // 0 }}"])
def test_a_template_that_stumbles_over_the_messages_has_refused_them(tmp_path: Path, template: str) -> None:
    tokenizer_files(tmp_path, template)
    with pytest.raises(ValueError, match="refused the messages"):
        load_tokenizer(tmp_path).chat([{"role": "user", "content": "x"}])


def test_a_model_without_template_cannot_chat(tmp_path: Path) -> None:
    tokenizer_files(tmp_path)
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(tmp_path).chat([{"role": "user", "content": "x"}])
