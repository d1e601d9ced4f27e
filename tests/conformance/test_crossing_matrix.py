"""The crossing matrix: features of a request together, each combination beside the plain path.

The plain path is the same question greedy, alone, not streamed and from an empty cache, asked of a daemon of
its own meanwhile (one thread each: two in one daemon would wait for each other's core). The combination must
give the same answer: to the bit where it is deterministic, else up to a near-tie of the two best tokens. A
cancelled combination must leave nothing behind, and what it sent must have been right up to there.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from lichen.adapters.draft_head import DraftHead, write_head
from lichen.adapters.registry import Registry
from lichen.runtime.tools.hermes import FORMAT
from lichen.sync.download import hash_file
from tests.adapters.made_adapters import add_made
from tests.conformance.covering import Combination, covering
from tests.conformance.crossing import (
    ANSWER,
    AXES,
    MAX_TOKENS,
    SHARED_TOKENS,
    TOOLS,
    body,
    messages,
    offered,
    plain_body,
)
from tests.conformance.outcome import NEAR_TIE, LogprobOf, Outcome, Row, lead_where_they_part, streamed, whole
from tests.conftest import RunningDaemon, StartDaemon
from tests.runtime.speculation.made_heads import following_head

VALUES = {name: list(axis.values) for name, axis in AXES.items()}
PAIRS = covering(VALUES)  # every pair of values: these run with the fast tests
MATRIX = [*PAIRS, *covering(VALUES, strength=3)]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
COUNTING = {"prompt": "Count: 1, 2, 3, 4,", "temperature": 0, "max_tokens": 500, "stream": True}
STORY = "An old ferry crossed the river. "
LATE_EVENTS = 8  # a late cancellation comes after so many events of a stream
LATE_S = 0.2  # or after so long
AHEAD = 2  # combinations whose plain answers are begun


def test_the_matrix_is_large_enough() -> None:
    assert len(MATRIX) >= 60


class PlainPath:
    """Plain answers, once for each request (which repeats to the bit), and worked out ahead."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self._asked: dict[str, Future[Any]] = {}
        self._worker = ThreadPoolExecutor(max_workers=1)

    def begin(self, asked: dict[str, Any]) -> Future[Any]:
        """Ask without waiting."""
        assert asked["deterministic"], "only then a repeat is equal"
        key = json.dumps(asked, sort_keys=True)
        if key not in self._asked:
            self._asked[key] = self._worker.submit(ask, self.client, asked)
        return self._asked[key]

    def choice(self, asked: dict[str, Any]) -> Outcome:
        """The one choice of an answer."""
        return whole(self.begin(asked).result()["choices"][0])

    def close(self) -> None:
        """Give up what nobody waits for."""
        self._worker.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def home(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the adapters a and b, which change what is said and leave it language."""
    home = tmp_path_factory.mktemp("adapted")
    registry = Registry(home / "adapters")
    for seed, name in enumerate("ab"):
        registry.promote(name, add_made(registry, name, model_path, seed, strength=0.2).digest)
    return home


Side = tuple[RunningDaemon, httpx.Client]


@pytest.fixture(scope="module")
def sides(start_daemon: StartDaemon, home: Path, model_path: Path) -> Iterator[dict[str, Side]]:
    """The daemons of the combinations, by drafter: 8 slots; they draft, so that a request can do without."""
    given = ("--slots", "8", "--threads", "1", "--queue", "256", "--answer-memory", "0")
    suffix = start_daemon(*given, "--speculation", "suffix", home=home)
    with httpx.Client(base_url=suffix.base_url, timeout=120) as first:
        head = home / "head.gguf"
        write_head(head, head_of(first, model_path))
        headed = start_daemon(*given, "--speculation", "head", "--draft-head", str(head), home=home)
        with httpx.Client(base_url=headed.base_url, timeout=120) as second:
            yield {"no": (suffix, first), "suffix": (suffix, first), "head": (headed, second)}


def head_of(client: httpx.Client, model_path: Path) -> DraftHead:
    """A head that knows what the model says in a few words of its own."""
    asked = {"prompt": STORY, "temperature": 0, "max_tokens": 48, "deterministic": True}
    said = STORY + client.post("/completions", json=asked).json()["choices"][0]["text"]
    root = str(client.base_url).removesuffix("/v1/")
    tokens = client.post(f"{root}/tokenize", json={"content": said}).json()["tokens"]
    return following_head([tokens], base=hash_file(model_path), vocabulary=49_152, hidden=576)


@pytest.fixture(scope="module")
def plain(start_daemon: StartDaemon, home: Path) -> Iterator[PlainPath]:
    alone = start_daemon("--slots", "2", "--threads", "1", home=home)
    with httpx.Client(base_url=alone.base_url, timeout=120) as client:
        path = PlainPath(client)
        yield path
        path.close()


@pytest.mark.parametrize(
    "number",
    [pytest.param(at, marks=pytest.mark.slow if at >= len(PAIRS) else ()) for at in range(len(MATRIX))],
)
def test_a_combination_equals_the_plain_path(sides: dict[str, Side], plain: PlainPath, number: int) -> None:
    combination = MATRIX[number]
    daemon, client = sides[combination["speculation"]]
    print(combination)
    for ahead in range(number, min(number + AHEAD, len(MATRIX))):
        plain.begin(plain_body(ahead, MATRIX[ahead]))
    if combination["prefix"] == "shared":
        warm = body(number, combination) | {"max_tokens": 1, "stream": False, "stream_options": None, "n": 1}
        ask(
            client,
            warm | {"messages": [messages(number, combination)[0], {"role": "user", "content": "Hello!"}]},
        )
    before = daemon.wait_idle()
    with neighbour(daemon, combination["neighbour"], number):
        outcomes, usage = run(daemon, client, number, combination)
    after = daemon.wait_idle()
    assert after["free_slots"] == before["free_slots"] == 8
    ended = sum(after[name] - before[name] for name in ("completed", "cancelled", "failed"))
    assert ended == after["requests"] - before["requests"]
    assert after["failed"] == before["failed"]
    found = plain.begin(plain_body(number, combination)).result()
    (expected,) = map(whole, found["choices"])
    for outcome in outcomes:
        if combination["cancel"] == "no":
            exact = combination["deterministic"] == "yes"
            check(plain, number, combination, outcome, expected, exact=exact)
        else:
            check_beginning(plain, number, combination, outcome, expected)
    if usage is not None:
        check_usage(combination, usage, found["usage"])
    if combination["cancel"] != "no":
        again = plain_body(number, combination) | {"deterministic": False}
        outcome = whole(ask(client, again)["choices"][0])
        check(plain, number, combination, outcome, expected, exact=False)


@pytest.mark.parametrize("drafter", ["suffix", "head"])
def test_the_daemons_draft(sides: dict[str, Side], drafter: str) -> None:
    """Else their half of the matrix would show nothing. What drafts lost in it may leave none for a while."""
    daemon, client = sides[drafter]
    client.post("/completions", json={"prompt": STORY * 3, "temperature": 0, "max_tokens": 48})
    assert daemon.wait_idle()["draft_tokens"] > 0


def run(
    daemon: RunningDaemon, client: httpx.Client, number: int, combination: Combination
) -> tuple[list[Outcome], dict[str, Any] | None]:
    """Ask as the combination says; the choices as far as they came, and the usage."""
    asked = body(number, combination)
    count = int(combination["n"])
    if combination["cancel"] != "no":
        return cut(daemon, asked, late=combination["cancel"] == "late"), None
    if combination["stream"] == "no":
        answer = ask(client, asked)
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        return [whole(choice) for choice in answer["choices"]], answer["usage"]
    with client.stream("POST", "/chat/completions", json=asked) as response:
        assert response.status_code == 200, response.read()
        outcomes, usage = streamed(response.iter_lines(), count)
    assert usage is not None
    return outcomes, usage


def ask(client: httpx.Client, asked: dict[str, Any]) -> Any:
    response = client.post("/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert ("adapter" in answer) == (":" in asked["model"])
    return answer


def cut(daemon: RunningDaemon, asked: dict[str, Any], *, late: bool) -> list[Outcome]:
    """Ask, and break the connection off; what came before of a stream."""
    connection = http.client.HTTPConnection(daemon.url.removeprefix("http://"), timeout=30)
    lines: list[str] = []
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"}
        )
        if late and asked.get("stream"):
            with connection.getresponse() as response:  # which holds the socket too
                while len(lines) < LATE_EVENTS and (line := response.readline()):
                    lines += [line.decode().rstrip()] if line.startswith(b"data: {") else []
        else:
            time.sleep(LATE_S if late else 0.01)
    finally:
        connection.close()
    return streamed(lines, asked.get("n", 1))[0]


@contextmanager
def neighbour(daemon: RunningDaemon, kind: str, number: int) -> Iterator[None]:
    """Another client's request that is being answered meanwhile; it must not notice us either."""
    if kind == "none":
        yield
    elif kind == "stream":
        with httpx.stream("POST", f"{daemon.base_url}/completions", json=COUNTING, timeout=60) as response:
            lines = response.iter_lines()
            texts = [_text(next(lines))]
            yield
            texts += [_text(line) for _, line in zip(range(6), lines, strict=False)]
        assert " 5, 6, 7,".startswith("".join(texts)[:9])
    else:
        prompt = {"prompt": f"{number} " + "moss " * 40, "max_tokens": 1}
        codes: list[int] = []
        url = f"{daemon.base_url}/completions"
        other = threading.Thread(
            target=lambda: codes.append(httpx.post(url, json=prompt, timeout=60).status_code)
        )
        other.start()
        yield
        other.join()
        assert codes == [200]


def _text(line: str) -> str:
    if not line.startswith("data: {"):
        return ""
    return "".join(choice["text"] for choice in json.loads(line[6:])["choices"])


def check(
    plain: PlainPath,
    number: int,
    combination: Combination,
    outcome: Outcome,
    expected: Outcome,
    *,
    exact: bool,
) -> None:
    """The outcome is the expected one, or (unless `exact`) left it at a near-tie; and it is well formed."""
    same = (outcome.content, outcome.calls, outcome.finish) == (
        expected.content,
        expected.calls,
        expected.finish,
    )
    if exact:
        assert same, f"{outcome}\nis not\n{expected}"
        for ours, other in zip(outcome.rows, expected.rows, strict=bool(outcome.rows)):
            assert (ours["bytes"], ours["logprob"]) == (other["bytes"], other["logprob"])
    elif not same:
        without_stop = plain_body(number, combination) | {"stop": None}
        rows = plain.choice(without_stop).rows
        lead = lead_where_they_part(
            rows, may_have_written(combination, outcome), asker(plain.client, number, combination)
        )
        print(f"leaves the plain path: lead {lead:.3f}\n{outcome.raw()!r}\n{expected.raw()!r}")
        assert lead < NEAR_TIE
    check_logprobs(combination, outcome)
    check_form(plain, number, combination, outcome, same=same)


def stops(combination: Combination) -> tuple[str, ...]:
    """The stop strings of a combination."""
    given = AXES["stop"].values[combination["stop"]].get("stop", ())
    return (given,) if isinstance(given, str) else tuple(given)


def may_have_written(combination: Combination, outcome: Outcome) -> list[str]:
    """The outcome's text, also with each stop string that may have ended it, and a call that was cut."""
    said = outcome.raw()
    if outcome.finish != "length":
        return [said, *(said + stop for stop in stops(combination))]
    if not outcome.calls or outcome.rows:
        return [said]
    return [said, said + FORMAT.tail + FORMAT.marker, f"{said}{FORMAT.tail}\n{FORMAT.marker}"]


def check_logprobs(combination: Combination, outcome: Outcome) -> None:
    """As many as were asked for, for every token of what was said."""
    wanted = combination["logprobs"]
    if combination["cancel"] == "no":
        said = bool(outcome.content or outcome.calls)  # a call that was cut has rows, and is not said
        assert bool(outcome.rows) == (wanted != "none" and (said or outcome.finish == "length"))
        assert all(len(row["top_logprobs"]) == int(wanted) for row in outcome.rows)
    if outcome.rows and not outcome.calls:
        assert (
            b"".join(bytes(row["bytes"]) for row in outcome.rows)
            .decode("utf-8", "ignore")
            .startswith(outcome.content)
        )


def check_form(
    plain: PlainPath, number: int, combination: Combination, outcome: Outcome, *, same: bool
) -> None:
    """Calls and JSON are valid once the answer is complete; a stop string may cut both."""
    if combination["tools"] != "none":
        assert FORMAT.marker not in outcome.content, "a call that was cut is no text"
    if combination["tools"] in ("required", "named"):
        assert not outcome.content
    if combination["tools"] == "named":
        assert {name for name, _ in outcome.calls} <= {"weather"}
    if outcome.finish == "length":
        return
    assert outcome.finish == ("tool_calls" if outcome.calls else "stop")
    try:
        for name, arguments in outcome.calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        if combination["schema"] != "none" and not outcome.calls:
            schema = ANSWER if combination["schema"] == "json_schema" else {"type": "object"}
            jsonschema.validate(json.loads(outcome.content), schema)
    except (ValueError, jsonschema.ValidationError):
        if combination["stop"] == "none":
            raise
        if same:  # then a stop string must follow where it was cut
            uncut = plain.choice(plain_body(number, combination) | {"stop": None}).raw()
            rest = uncut.removeprefix(outcome.raw())
            assert rest != uncut and rest.startswith(stops(combination))


def check_beginning(
    plain: PlainPath, number: int, combination: Combination, outcome: Outcome, expected: Outcome
) -> None:
    """What came before the connection broke is how the plain path begins, up to a near-tie."""
    said = outcome.raw()
    if not expected.raw().startswith(said):
        lead = lead_where_they_part(expected.rows, [said], asker(plain.client, number, combination))
        assert lead < NEAR_TIE, f"lead {lead:.3f}\n{said!r}\n{expected.raw()!r}"


def asker(client: httpx.Client, number: int, combination: Combination) -> LogprobOf:
    """Asks the plain path how likely the likeliest token is that begins a text, by forcing it."""
    root = str(client.base_url).removesuffix("/v1/")

    def tokens(text: str) -> list[int]:
        found: list[int] = client.post(f"{root}/tokenize", json={"content": text}).json()["tokens"]
        return found

    def logprob_of(rows: Sequence[Row], rest: bytes) -> float:
        spoken = {"messages": messages(number, combination), "tools": offered(combination)}
        prompt = tokens(client.post(f"{root}/apply-template", json=spoken).json()["prompt"])
        prompt += [token for row in rows for token in tokens(bytes(row["bytes"]).decode())]
        text = rest.decode()
        candidates = {one[0] for length in range(1, 16) if len(one := tokens(text[:length])) == 1}
        if not candidates:
            return float("-inf")
        forced = {
            "model": body(number, combination)["model"],
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 0,
            "deterministic": True,
            "logit_bias": dict.fromkeys(map(str, candidates), 100),  # the likeliest of them comes
        }
        answer = client.post("/completions", json=forced).json()
        return float(answer["choices"][0]["logprobs"]["token_logprobs"][0])

    return logprob_of


def check_usage(combination: Combination, usage: dict[str, Any], plain: dict[str, Any]) -> None:
    """The prompt has as many tokens as on the plain path, and comes from the cache only where it may."""
    assert usage["prompt_tokens"] == plain["prompt_tokens"]
    assert usage["completion_tokens"] <= int(combination["n"]) * MAX_TOKENS
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    if combination["deterministic"] == "yes":
        assert cached == 0
    elif combination["prefix"] == "shared":
        assert cached >= SHARED_TOKENS
    else:
        assert cached < SHARED_TOKENS
