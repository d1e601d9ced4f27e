"""What came back for one choice, and whether two answers are the same up to a near-tie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lichen.runtime.tools.hermes import FORMAT

# Another batch shape moved log-probabilities of these prompts by up to 0.47 (most by less than 0.2), in the
# tail, where grammars choose, more than at the top; and each of two tokens moves by itself.
NEAR_TIE = 0.6

Row = Mapping[str, Any]  # one token of `logprobs.content`


@dataclass
class Outcome:
    """One choice. rows: its tokens with log-probabilities, where they were asked for."""

    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # (name, arguments as JSON text)
    finish: str | None = None
    rows: list[Row] = field(default_factory=list)

    def raw(self) -> str:
        """The text as the model wrote it, calls included."""
        if self.rows:
            return text_of(self.rows)
        calls = [f"{FORMAT.marker}{FORMAT.head(name)}{arguments}" for name, arguments in self.calls]
        if not calls:
            return self.content
        tail = "" if self.finish in (None, "length") else FORMAT.tail  # the last call may be cut anywhere
        return self.content + f"{FORMAT.tail}\n".join(calls) + tail


def text_of(rows: Sequence[Row]) -> str:
    """The text of tokens."""
    return b"".join(bytes(row["bytes"]) for row in rows).decode("utf-8", "ignore")


def whole(choice: Mapping[str, Any]) -> Outcome:
    """A choice of a whole answer."""
    message = choice["message"]
    return Outcome(
        message["content"] or "",
        [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())],
        choice["finish_reason"],
        (choice["logprobs"] or {}).get("content", []),
    )


def streamed(lines: Iterable[str], count: int) -> tuple[list[Outcome], dict[str, Any] | None]:
    """The choices of a stream, and its usage. lines: of server-sent events, perhaps cut off."""
    outcomes = [Outcome() for _ in range(count)]
    usage = None
    for line in lines:
        if not line.startswith("data: {"):
            continue
        event = json.loads(line[6:])
        assert "error" not in event, event
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            _add(outcomes[choice["index"]], choice)
    return outcomes, usage


def _add(outcome: Outcome, choice: Mapping[str, Any]) -> None:
    delta = choice["delta"]
    outcome.content += delta.get("content") or ""
    outcome.rows += (choice["logprobs"] or {}).get("content", [])
    outcome.finish = choice["finish_reason"] or outcome.finish
    for call in delta.get("tool_calls", ()):
        if "name" in call["function"]:
            assert call["index"] == len(outcome.calls), "calls come in order"
            outcome.calls.append((call["function"]["name"], ""))
        name, arguments = outcome.calls[call["index"]]
        outcome.calls[call["index"]] = (name, arguments + call["function"]["arguments"])


LogprobOf = Callable[
    [Sequence[Row], bytes], float
]  # of the best token that begins these bytes, behind these rows


def lead_where_they_part(rows: Sequence[Row], texts: Iterable[str], logprob_of: LogprobOf) -> float:
    """By how much the plain path's token led, where another answer left it (natural-log units).

    rows: the plain path's tokens, with the likeliest 20 at each. texts: what the other may have written
    (behind a stop string nobody sees how it went on). The other's token is the likeliest one that its text
    allows; `logprob_of` is asked where it is not among the 20. Infinite where the plain path had ended.
    """
    return min(_lead(rows, text.encode(), logprob_of) for text in texts)


def _lead(rows: Sequence[Row], text: bytes, logprob_of: LogprobOf) -> float:
    done = b""
    for at, row in enumerate(rows):
        after = done + bytes(row["bytes"])
        if not text.startswith(after):
            rest = text[len(done) :]
            others = [
                top["logprob"]
                for top in row["top_logprobs"]
                if bytes(top["bytes"]) != bytes(row["bytes"]) and _begins(rest, bytes(top["bytes"]))
            ]
            return float(row["logprob"]) - (max(others) if others else logprob_of(rows[:at], rest))
        done = after
    return float("inf")


def _begins(rest: bytes, token: bytes) -> bool:
    """Whether a token may be next: a token without text ends the answer."""
    return rest.startswith(token) if token else not rest
