"""The model's own chat template: messages in, prompt text out.

A template is code that came with a model file. It runs in jinja2's immutable sandbox, on its own thread,
under a limit of time, of output size, and of what one operation may build.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from lichen.errors import TemplateError

log = logging.getLogger("lichen.chat")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_SECONDS = 2.0
MAX_CHARACTERS = 16 << 20
MAX_OPERAND = 1 << 20  # items that `*` may build, and digits' worth that `**` may reach

Message = Mapping[str, Any]
ALWAYS = ("completion", "chat", "embedding", "json_schema")  # what any model here can do


class _Overrun(BaseException):
    """Raised inside a template that has used up its time; not an Exception, so no filter swallows it."""


class _Refusal(jinja2.TemplateError):
    """`raise_exception(...)` in a template: its own words for why these messages cannot be rendered."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and max(abs(left), abs(right)) > 64:
            raise _Refusal("the template computes a power that is too large")
        if operator == "*":
            sized, times = (left, right) if isinstance(left, str | list | tuple) else (right, left)
            if isinstance(sized, str | list | tuple) and len(sized) * times > MAX_OPERAND:
                raise _Refusal("the template builds a value that is too large")
        return super().call_binop(context, operator, left, right)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(reason: str) -> None:
    raise _Refusal(str(reason)[:500])


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json  # jinja2's own escapes HTML, which no model was trained on
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """A compiled chat template.

    source: jinja2 text from `tokenizer.chat_template`; None falls back to ChatML, as the peers do.
    bos, eos: how the model writes those tokens. Raises TemplateError if the source does not compile.
    """

    def __init__(self, source: str | None, *, bos: str = "", eos: str = "") -> None:
        if source is None:
            log.warning("The model has no chat template; ChatML is used instead.")
        self.source = source or CHATML
        self.thinks = "</think>" in self.source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            environment = _environment()
            self._template = environment.from_string(self.source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(self.source))
        except (jinja2.TemplateError, RecursionError, OverflowError) as error:
            raise TemplateError(f"The model's chat template cannot be compiled: {error}.") from error
        self.takes_tools = "tools" in variables

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """Prompt text for these messages. Blocks for at most MAX_SECONDS: call it off the event loop.

        tools: in OpenAI's shape, for a template that `takes_tools`.

        Raises TemplateError when the template refuses, fails, takes too long or writes too much.
        """
        job = _Rendering(
            self._template,
            {
                "messages": list(messages),
                "tools": list(tools) or None,
                "add_generation_prompt": add_generation_prompt,
                **self._tokens,
            },
        )
        return job.result(MAX_SECONDS)


@functools.lru_cache(maxsize=256)
def capabilities(source: str | None) -> tuple[str, ...]:
    """What a model can do, as lists of models name it: what all can, and what its chat template was made for.

    source: as for `ChatTemplate`. "tools": the template takes tools (lichen teaches them to other models in a
    system message, with less success). "thinking": it knows where reasoning ends.
    """
    if source is None:
        return ALWAYS
    try:
        template = ChatTemplate(source)
    except TemplateError:  # such a model cannot be loaded; its list is not the place to say so
        return ALWAYS
    found = {"tools": template.takes_tools, "thinking": template.thinks}
    return (*ALWAYS, *(name for name, there in found.items() if there))


class _Rendering:
    """One render on a thread of its own, which can be interrupted at its next Python instruction."""

    def __init__(self, template: jinja2.Template, values: dict[str, Any]) -> None:
        self._template = template
        self._values = values
        self._text: str | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lichen-template", daemon=True)

    def result(self, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        self._thread.start()
        self._thread.join(seconds)
        while self._thread.is_alive():  # the first shot can be lost if it lands in a C call's cleanup
            identity = self._thread.ident
            assert identity is not None, "a started thread has an identity"
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(identity), ctypes.py_object(_Overrun))
            self._thread.join(0.05)
            if time.monotonic() > deadline + 1:
                break
        if self._text is not None:
            return self._text
        if self._error is None or isinstance(self._error, _Overrun):
            raise TemplateError(f"The model's chat template ran for more than {seconds:g} s.")
        raise TemplateError(
            f"The model's chat template cannot render these messages: {self._error}.", param="messages"
        ) from self._error

    def _run(self) -> None:
        try:
            self._text = self._render()
        except BaseException as error:  # handed to the caller's thread
            self._error = error

    def _render(self) -> str:
        parts: list[str] = []
        size = 0
        for part in self._template.generate(self._values):
            size += len(part)
            if size > MAX_CHARACTERS:
                raise _Refusal(f"it wrote more than {MAX_CHARACTERS} characters")
            parts.append(part)
        return "".join(parts)
