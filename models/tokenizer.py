"""The model's own tokenizer: text to ids with character spans, ids to text, chat template.

Works on the Rust tokenizer inside transformers' wrapper, on a copy of its own: nothing truncates or pads,
nothing warns about length, and calls from several threads do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from models.contract import Encoding, ModelError

_REPLACEMENT = "\ufffd"
_SPACE_MARK = "▁"  # how SentencePiece vocabularies spell a leading space


class TextTokenizer:
    """``models.contract.Tokenizer`` on a fast tokenizer of transformers."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._rust: RustTokenizer = RustTokenizer.from_str(wrapper.backend_tokenizer.to_str())
        self._rust.no_truncation()
        self._rust.no_padding()

    @property
    def vocab_size(self) -> int:
        return self._rust.get_vocab_size(with_added_tokens=True)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        return tuple(sorted(set(self._wrapper.all_special_ids)))

    @property
    def eos_token_id(self) -> int | None:
        found: int | None = self._wrapper.eos_token_id
        return found

    def encode(self, text: str, *, special_tokens: bool = True) -> Encoding:
        """Ids and character spans of the whole text. ValueError where the text is not valid Unicode."""
        try:
            encoding = self._rust.encode(text, add_special_tokens=special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError("text holds a lone surrogate: send valid Unicode") from error
        return Encoding(list(encoding.ids), list(encoding.offsets))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text; its spelling in the vocabulary where its bytes alone are no text, "" where there
        is none."""
        spelling = self._rust.id_to_token(token_id)
        if spelling is None:
            return ""
        text = self._rust.decode([token_id], skip_special_tokens=False)
        if _REPLACEMENT in text and spelling != text:
            return spelling
        if spelling.startswith(_SPACE_MARK) and not text.startswith(" "):
            return " " + text
        return text

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The model's own chat template applied (sandboxed), generation prompt added; it writes special
        tokens itself.

        Raises ModelError where the model has none, ValueError where the template refuses the messages.
        """
        if not self._wrapper.chat_template:
            raise ModelError(
                "this model has no chat template: send a prompt to /v1/generate or /v1/completions"
            )
        try:
            text = self._wrapper.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(f"the model's chat template refused the messages: {error}") from error
        return str(text)


def load_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer of a local model directory. ModelError where there is none or only a slow one."""
    try:
        wrapper = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    if not getattr(wrapper, "is_fast", False):
        raise ModelError(f"{directory} holds only a slow tokenizer; save a tokenizer.json beside the model")
    return TextTokenizer(wrapper)
