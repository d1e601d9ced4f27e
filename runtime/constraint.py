"""What an answer must look like: a grammar that allows, at each token, only what can still become valid.

Grammars are llguidance's (JSON schemas and a Lark dialect; docs/decisions/0005 compares the libraries).
A model's vocabulary is prepared once, on first use, and compiled grammars are kept for the next request.
Not covered: how a grammar is written for tools or thinking; see `grammar.py`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from lichen.errors import RequestError

if TYPE_CHECKING:
    from lichen.runtime.native import Model

MAX_GRAMMAR = 1 << 20  # characters
KEPT_GRAMMARS = 64


class Constraint:
    """The grammar's state in one answer; used by the engine thread only.

    Raises nothing: a matcher that fails inside (a limit of the library) ends the answer, see `failure`.
    """

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._words = words  # 32-bit words of the mask
        self._mask: Any = None

    def mask(self, logits: Any) -> None:
        """Set the logits ([vocab] float32, in place) of tokens that the grammar forbids to -inf."""
        import numpy as np

        if self._mask is None:
            self._mask = np.empty(self._words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        # Bits are turned over before they become bytes: a quarter faster than comparing the bytes.
        forbidden = np.unpackbits(~self._mask.view(np.uint8), bitorder="little")[: logits.size]
        np.putmask(logits[: forbidden.size], forbidden.view(np.bool_), -np.inf)
        logits[forbidden.size :] = -np.inf

    def accept(self, token: int) -> None:
        """Tell the grammar which token was drawn."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow any more."""
        return bool(self._matcher.is_stopped())

    @property
    def failure(self) -> str | None:
        """Why the grammar cannot go on, where the library gave up on it."""
        return str(self._matcher.get_error()).splitlines()[0][:300] if self._matcher.is_error() else None


class Grammars:
    """Compiles grammars for one model's vocabulary. Thread-safe; compiling takes up to a second."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, grammar: str, *, param: str) -> Constraint:
        """A fresh state of the grammar. Blocks: call it off the event loop.

        Raises RequestError that names `param` for a grammar that cannot be compiled.
        """
        if len(grammar) > MAX_GRAMMAR:
            raise RequestError(
                f"The grammar of {param} has {len(grammar)} characters; at most {MAX_GRAMMAR} are allowed.",
                param=param,
            )
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compiled[grammar] = self._compile(grammar, param)
                while len(self._compiled) > KEPT_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return Constraint(matcher.deep_copy(), (self._tokenizer.vocab_size + 31) // 32)

    def _compile(self, grammar: str, param: str) -> Any:
        import llguidance

        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(self._model)))
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            reason = str(matcher.get_error()).splitlines()[0][:300]
            raise RequestError(f"{param} cannot be enforced: {reason}.", param=param)
        return matcher


class _Vocabulary:
    """A model's vocabulary as llguidance reads it: control tokens are marked with a byte 0xFF."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.eos_token_id = model.eos
        self.bos_token_id = model.bos if model.bos >= 0 else None
        ends = [token for token in range(model.vocab_size) if model.is_end(token)]
        self.special_token_ids = ends
        self.tokens = [self._bytes(token) for token in range(model.vocab_size)]

    def _bytes(self, token: int) -> bytes:
        text = self._model.marked_piece(token)
        return b"\xff" + text if self._model.is_marker(token) else text

    def __call__(self, text: bytes | str) -> list[int]:
        decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._model.tokenize(decoded, special=False, add_bos=False)
