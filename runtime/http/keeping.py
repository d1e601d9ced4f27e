"""Which answers go into the journal, and how they get there without anybody waiting for the disk.

An answer is kept where its request says `store: true`, or else by its API key or by the setting `journal`;
`store: false` always keeps it out. It is handed to the journal's thread before the client gets the last byte,
so that feedback on it, which goes through the same queue, finds it. What fails is counted and logged: the
answer itself never suffers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from aiohttp import web

from lichen.adapters.records import NOBODY, Kept
from lichen.adapters.thread import JournalThread
from lichen.errors import JournalBusy, UnsupportedField
from lichen.runtime.adaptation import Adaptation
from lichen.runtime.http.answers import KeepAnswers
from lichen.runtime.http.log_format import EXCHANGE
from lichen.runtime.http.schema import ChatBody, CompletionBody, FunctionSpec
from lichen.runtime.metrics import ProcessMetrics
from lichen.runtime.served_model import ServedModel

log = logging.getLogger("lichen.journal")

Policy = Literal["off", "ask", "all"]
Requests = list[dict[str, Any]]  # what was asked, once for each prompt; an empty list is not kept


def asker() -> str:
    """Id of the API key of the request that is handled now, or NOBODY."""
    exchange = EXCHANGE.get()
    return NOBODY if exchange is None or exchange.key == "-" else exchange.key


class Keeping:
    """The policy of one daemon. journal: None where it keeps nothing."""

    def __init__(self, policy: Policy, journal: JournalThread | None, metrics: ProcessMetrics) -> None:
        self._policy = policy
        self._journal = journal
        self._metrics = metrics
        self._failing = False

    def wanted(self, store: bool | None) -> bool:
        """Whether a request's answer is to be kept. Raises UnsupportedField where it asks and must not."""
        if self._journal is None or self._policy == "off":
            if store:
                raise UnsupportedField(
                    "This daemon keeps no answers.", hint="Start it with --journal ask.", param="store"
                )
            return False
        if store is not None:
            return store
        exchange = EXCHANGE.get()
        return self._policy == "all" or (exchange is not None and exchange.keeps)

    def of_chat(self, body: ChatBody, messages: list[dict[str, Any]]) -> Requests:
        """What to keep of a chat request."""
        if not self.wanted(body.store):
            return []
        tools = [{"type": "function", "function": _given(spec.function)} for spec in body.tools]
        return [{"messages": messages, **({"tools": tools} if tools else {})}]

    def of_text(self, body: CompletionBody, prompts: Sequence[str | list[int]]) -> Requests:
        """What to keep of a completion request; token ids teach nothing to another model."""
        if not self.wanted(body.store):
            return []
        texts = [{"prompt": prompt} for prompt in prompts if isinstance(prompt, str)]
        if len(texts) == len(prompts):
            return texts
        if body.store:
            raise UnsupportedField(
                "Answers to token ids are not kept; send the prompt as text.", param="store"
            )
        return []

    def keeper(
        self, request: web.Request, kept: Requests, model: ServedModel, adaptation: Adaptation
    ) -> KeepAnswers | None:
        """Who takes the answers of `request` once they are complete; None where nobody does.

        adaptation: what they are computed with.
        """
        journal, owner = self._journal, asker()
        if not kept or journal is None:
            return None
        size, info, adapter = request.content_length or 0, model.info, model.adapter
        as_it_is = adaptation == model.adaptation

        def keep(response: str, answers: list[dict[str, Any]]) -> None:
            each = math.ceil(len(answers) / len(kept))
            records = [
                Kept(
                    owner=owner,
                    response=response,
                    choice=choice,
                    kind="chat" if "messages" in kept[0] else "text",
                    request=kept[choice // each],
                    answer=answer,
                    model=info.name,
                    model_sha256=info.sha256,
                    adapter=adapter if as_it_is else None,
                    adapter_sha256=adaptation.digest if as_it_is else None,
                )
                for choice, answer in enumerate(answers)
            ]
            try:
                journal.post(
                    lambda opened: [opened.keep(record) for record in records],
                    size=size + sum(len(str(answer)) for answer in answers),
                    told=lambda _ids, error: self._told(len(records), error),
                )
            except JournalBusy as error:
                self._told(len(records), error)

        return keep

    def _told(self, count: int, error: BaseException | None) -> None:
        """Count what became of answers; one line when they begin to fail, not one for each."""
        self._metrics.kept["kept" if error is None else "failed"] += count
        if error is not None and not self._failing:
            log.warning("Answers are not kept: %s", error)
        self._failing = error is not None


def _given(spec: FunctionSpec) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(spec).items() if value is not None}
