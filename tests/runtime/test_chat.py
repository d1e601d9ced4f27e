"""Chat templates: the model's own, broken ones, and hostile ones."""

from __future__ import annotations

import time

import pytest

from lichen.errors import TemplateError
from lichen.runtime.chat import ALWAYS, ChatTemplate, capabilities

HELLO = [{"role": "user", "content": "Hello <b>&</b>"}]


def test_messages_are_rendered_without_html_escaping() -> None:
    assert ChatTemplate("{{ messages[0].content }}").render(HELLO) == "Hello <b>&</b>"


def test_tojson_is_plain_json() -> None:
    assert ChatTemplate("{{ messages | tojson }}").render(HELLO) == (
        '[{"role": "user", "content": "Hello <b>&</b>"}]'
    )


def test_without_a_template_chatml_is_used() -> None:
    assert ChatTemplate(None).render(HELLO) == (
        "<|im_start|>user\nHello <b>&</b><|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_and_generation_prompt_reach_the_template() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% if add_generation_prompt %}A{% endif %}{{ eos_token }}", bos="<s>"
    )
    assert template.render(HELLO) == "<s>A"
    assert template.render(HELLO, add_generation_prompt=False) == "<s>"


@pytest.mark.parametrize("source", ["{% for %}", "{{ 1 +", "{% unknown_tag %}"])
def test_a_malformed_template_is_refused_when_it_is_loaded(source: str) -> None:
    with pytest.raises(TemplateError, match="cannot be compiled"):
        ChatTemplate(source)


def test_the_templates_own_refusal_reaches_the_caller() -> None:
    with pytest.raises(TemplateError, match="roles must alternate") as caught:
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(HELLO)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 'a' * 10**9 }}",
        "{{ [0] * 99999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ range(10**9) | list }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'aaaaaaaaaaaa' }}{% endfor %}{% endfor %}",
    ],
)
def test_a_hostile_template_is_stopped(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(HELLO)
    assert time.monotonic() - started < 30


def test_a_template_that_never_ends_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lichen.runtime.chat.MAX_SECONDS", 0.2)
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match=r"ran for more than 0\.2 s"):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize(
    ("source", "more"),
    [
        (None, ()),
        ("{{ messages[0].content }}", ()),
        ("{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}", ("tools",)),
        ("{# tools #}{{ messages[0].tools }}", ()),
        ("{{ messages[-1].content.split('</think>')[-1] }}", ("thinking",)),
        ("{{ tools }}</think>", ("tools", "thinking")),
        ("{% for %}", ()),
        ("{{" * 2000, ()),
    ],
)
def test_capabilities_are_what_the_template_was_made_for(source: str | None, more: tuple[str, ...]) -> None:
    assert capabilities(source) == (*ALWAYS, *more)
