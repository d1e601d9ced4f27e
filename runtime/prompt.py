"""How a model is asked: a conversation to text, and text to tokens, the same for serving and for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lichen.runtime.chat import ChatTemplate, Message
from lichen.runtime.conversation import native_messages, textual_messages
from lichen.runtime.native import Model
from lichen.runtime.tools import DEFAULT, Tool, format_of, formats


class PromptWriter:
    """The template of one model. Raises TemplateError for one that does not compile.

    tools: how calls are written; the default format where the template teaches none.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._bos_text = model.special_text(model.bos)
        self.template = ChatTemplate(
            model.chat_template(), bos=self._bos_text, eos=model.special_text(model.eos)
        )
        native = format_of(self.template.source)
        self.tools = native or formats()[DEFAULT]
        self._native = native is not None and self.template.takes_tools

    def text(self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, asking: bool = True) -> str:
        """The rendered conversation. Blocks: milliseconds for long ones. Raises TemplateError.

        asking: it ends where the model is to answer.
        """
        offered: list[Mapping[str, Any]] = []
        if self._native:
            written, offered = native_messages(messages), [tool.plain() for tool in tools]
        else:
            written = textual_messages(messages, tools, self.tools)
        return self.template.render(written, tools=offered, add_generation_prompt=asking)

    def tokens(self, text: str) -> list[int]:
        """Token ids [n] of a rendered conversation: with the first token that the model wants, once."""
        has_bos = bool(self._bos_text) and text.startswith(self._bos_text)
        return self._model.tokenize(text, special=True, add_bos=not has_bos)
