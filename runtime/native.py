"""The one place that calls llama.cpp: model, context and sampler chain as small Python objects.

Invariants: a `Context` and the `Sampler`s used with it are touched by one thread only (the engine's).
A `Model`'s vocabulary is read-only after load, so tokenizing and detokenizing are safe from any thread.
Every native call that can fail is checked here and becomes an error of `lichen.errors`; no pointer
leaves this module. Not covered: encoder-decoder models, multimodal input.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lichen.errors import AdapterError, EngineError, ModelFileError

log = logging.getLogger("lichen.native")

DECODE_OK = 0
DECODE_NO_KV_SLOT = 1

_FLASH_ATTENTION_ENABLED = 1
_POOLING_NONE = 0  # llama.h, enum llama_pooling_type
_POOLING = {"1": "mean", "2": "first", "3": "last"}
_ATTRIBUTE_CONTROL = 1 << 3  # llama.h, enum llama_token_attr
_ATTRIBUTE_USER_DEFINED = 1 << 4
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # ggml.h
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # ggml.h, enum ggml_type: what keys and values can be
_BUFFER = re.compile(r"(compute|KV|RS|output) buffer size = +([0-9.]{1,12}) MiB")
_library: Any = None
_library_lock = threading.Lock()


def _import_bindings() -> Any:
    """Import only the ctypes module of the bindings.

    The package's own `__init__` pulls in numpy, jinja2 and a disk cache (0.1 s) that lichen does not
    use here, so a bare package object stands in for it while the submodule is imported.
    """
    # llama.cpp's compute threads wait for each other by spinning. With another busy process on the same
    # cores, libgomp's default (300,000 rounds) made two decoders 60 times slower; after 3,000 rounds a
    # thread sleeps instead, which costs nothing measurable on a quiet machine. docs/decisions/0003.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    name = "llama_cpp"
    if name in sys.modules:
        return importlib.import_module("llama_cpp.llama_cpp")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise EngineError(
            "The llama-cpp-python package is not installed.", hint="Run: pip install llama-cpp-python"
        )
    bare = types.ModuleType(name)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = bare
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except OSError as error:
        raise EngineError(f"llama.cpp's shared library cannot be loaded: {error}.") from error
    finally:
        del sys.modules[name]  # a later `import llama_cpp` gets the real package


def _library_with_log() -> Any:
    """The bindings, loaded once, with every native log line sent to `logging`."""
    global _library, _log_callback  # noqa: PLW0603 - one native library a process
    with _library_lock:
        if _library is None:
            lib = _import_bindings()
            _log_callback = lib.llama_log_callback(_NativeLog())
            lib.llama_log_set(_log_callback, ctypes.c_void_p(0))
            lib.llama_backend_init()
            _library = lib
    return _library


_log_callback: Any = None  # referenced for ever: the library keeps the pointer
_told = threading.local()  # buffers: bytes by kind that the context being made on this thread tells of


class _NativeLog:
    """Turns llama.cpp's log fragments into whole lines of the logger `lichen.native`."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._level = logging.INFO

    def __call__(self, level: int, text: bytes | None, _user: object) -> None:
        self._level = _LOG_LEVELS.get(level, self._level)  # 5 continues the line before it
        self._parts.append((text or b"").decode("utf-8", "replace"))
        if self._parts[-1].endswith("\n") or len(self._parts) > 256:
            line = "".join(self._parts).strip()
            self._parts.clear()
            if found := _BUFFER.search(line):
                told: dict[str, int] = getattr(_told, "buffers", {})
                told[found[1]] = told.get(found[1], 0) + int(float(found[2]) * (1 << 20))
            if line:
                log.log(self._level, "%s", line)


def gpu_offload() -> bool:
    """Whether the native library can compute on a GPU of this machine."""
    return bool(_library_with_log().llama_supports_gpu_offload())


def version() -> str:
    """Version of the installed llama.cpp bindings, without loading them."""
    return importlib.metadata.version("llama-cpp-python")


def system_info() -> str:
    """What the native library was compiled for (instruction sets, OpenMP, repacking)."""
    return bytes(_library_with_log().llama_print_system_info()).decode("utf-8", "replace").strip(" |")


class Model:
    """Weights and vocabulary of one GGUF file.

    Raises ModelFileError when llama.cpp refuses the file. Check it with `quant.gguf_check` first:
    the native loader trusts more of the file than it should.
    """

    def __init__(self, path: Path, *, progress: Callable[[float], bool] | None = None) -> None:
        lib = self._lib = _library_with_log()
        params = lib.llama_model_default_params()
        keep = None
        if progress is not None:
            keep = lib.llama_progress_callback(lambda done, _user: progress(float(done)))
            params.progress_callback = keep
        self._pointer = lib.llama_model_load_from_file(str(path).encode(), params)
        del keep
        if not self._pointer:
            raise ModelFileError(
                f"llama.cpp {version()} cannot load {path.name}.",
                hint="Run again with --log-level info to see its reason.",
            )
        self._vocab = lib.llama_model_get_vocab(self._pointer)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self._vocab))
        self.context_train = int(lib.llama_model_n_ctx_train(self._pointer))
        self.weight_bytes = int(lib.llama_model_size(self._pointer))
        self.bos = int(lib.llama_vocab_bos(self._vocab))
        self.eos = int(lib.llama_vocab_eos(self._vocab))
        architecture = self.metadata("general.architecture") or ""
        # Recurrent states cannot forget a token that turned out wrong.
        self.cuttable = not (
            lib.llama_model_is_recurrent(self._pointer) or lib.llama_model_is_hybrid(self._pointer)
        )
        self.causal = self.metadata(f"{architecture}.attention.causal") != "false"
        self.pooling = _POOLING.get(self.metadata(f"{architecture}.pooling_type") or "", "mean")
        self._pieces: dict[int, bytes] = {}
        self._eog: dict[int, bool] = {}

    def close(self) -> None:
        """Give the weights back; idempotent. Contexts over this model must be closed before."""
        if self._pointer:
            self._lib.llama_model_free(self._pointer)
            self._pointer = None

    def metadata(self, key: str) -> str | None:
        """A GGUF metadata value as text, or None."""
        size = 1 << 10
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = int(self._lib.llama_model_meta_val_str(self._pointer, key.encode(), buffer, size))
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    def chat_template(self) -> str | None:
        """The model's own jinja2 chat template, or None."""
        return self.metadata("tokenizer.chat_template")

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        """Token ids of `text`.

        special: parse control tokens that are written in it. add_bos: add what the model wants at its start.
        """
        data = text.encode("utf-8", "surrogatepass")
        size = len(data) + 8
        buffer = (ctypes.c_int32 * size)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, size, add_bos, special)
        if count < 0:  # a tokenizer may need more tokens than bytes
            size = -count
            buffer = (ctypes.c_int32 * size)()
            count = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, size, add_bos, special)
        if count < 0:
            raise EngineError("llama.cpp could not tokenize the text.")
        return buffer[:count]

    def piece(self, token: int) -> bytes:
        """Bytes of one token as text; control tokens give none. May be part of a UTF-8 character."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token, special=False)
        return piece

    def reveal(self, text: str) -> int | None:
        """Let a marker show in answers if it is one token of this vocabulary; that token."""
        tokens = self.tokenize(text, special=True, add_bos=False)
        if len(tokens) != 1 or not self.is_marker(tokens[0]):
            return None
        self._pieces[tokens[0]] = text.encode()
        return tokens[0]

    def marked_piece(self, token: int) -> bytes:
        """Bytes of one token as text, control tokens as they are written in a template."""
        return self._read_piece(token, special=True)

    def is_marker(self, token: int) -> bool:
        """Whether a token is a marker (control token, or a user-defined one like <tool_call>), not text."""
        attributes = int(self._lib.llama_vocab_get_attr(self._vocab, token))
        if attributes & _ATTRIBUTE_CONTROL:
            return True
        text = self._read_piece(token, special=True) if attributes & _ATTRIBUTE_USER_DEFINED else b""
        return text.startswith(b"<") and text.endswith(b">")

    def special_text(self, token: int) -> str:
        """How a control token is written in a template, or the empty string for a missing one."""
        return "" if token < 0 else self._read_piece(token, special=True).decode("utf-8", "replace")

    def _read_piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        buffer = ctypes.create_string_buffer(size)
        length = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = self._lib.llama_token_to_piece(self._vocab, token, buffer, -length, 0, special)
        return buffer.raw[:length]

    def is_end(self, token: int) -> bool:
        """Whether the model ends its answer with this token (end of turn, end of text)."""
        end = self._eog.get(token)
        if end is None:
            end = self._eog[token] = bool(self._lib.llama_vocab_is_eog(self._vocab, token))
        return end


class Adapter:
    """A LoRA adapter in memory over a model; `Context.adapt` applies it. Belongs to the engine's thread.

    Raises AdapterError when llama.cpp refuses the file. Check it with `quant.adapter_check` first.
    """

    def __init__(self, model: Model, path: Path) -> None:
        self._lib = model._lib
        self._pointer = self._lib.llama_adapter_lora_init(model._pointer, str(path).encode())
        if not self._pointer:
            raise AdapterError(
                f"llama.cpp {version()} cannot load the adapter {path}.",
                hint="Run again with --log-level info to see its reason.",
            )

    def close(self) -> None:
        """Give the memory back; idempotent. No context may have it applied, and the model must be open."""
        if self._pointer:
            self._lib.llama_adapter_lora_free(self._pointer)
            self._pointer = None


def _adapt(lib: Any, context: Any, adapter: Adapter | None, scale: float) -> None:
    """Replace the whole set of adapters of a native context."""
    count = 0 if adapter is None else 1
    pointers = (lib.llama_adapter_lora_p_ctypes * 1)()
    if adapter is not None:
        pointers[0] = adapter._pointer
    code = lib.llama_set_adapters_lora(context, pointers, count, (ctypes.c_float * 1)(scale))
    if code != 0:
        raise EngineError(f"llama.cpp could not apply an adapter (code {int(code)}).")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSize:
    """How much a context holds: `slots` sequences of `context` tokens each, `batch` tokens a decode, of
    which `outputs` may have logits (0: one a slot). kv: how keys and values are stored, of `KV_TYPES`."""

    context: int
    slots: int
    threads: int
    batch: int = 512
    outputs: int = 0
    kv: str = "f16"


class Context:
    """KV cache and compute buffers for `size.slots` sequences over one model; one stream a sequence.

    `docs/decisions/0001-kv-streams.md` says why the cache is not unified.
    """

    def __init__(self, model: Model, size: ContextSize) -> None:
        lib = self._lib = model._lib
        params = lib.llama_context_default_params()
        params.n_ctx = size.context * size.slots
        params.n_seq_max = size.slots
        params.n_batch = params.n_ubatch = size.batch
        self.outputs = params.n_outputs_max = max(size.slots, size.outputs)
        params.n_threads = params.n_threads_batch = size.threads
        params.flash_attn_type = _FLASH_ATTENTION_ENABLED
        params.type_k = params.type_v = KV_TYPES[size.kv]
        params.kv_unified = False
        params.no_perf = True
        self.buffers: dict[str, int] = {}  # bytes by kind (KV, compute, output), as llama.cpp tells them
        _told.buffers = self.buffers
        self._pointer = lib.llama_init_from_model(model._pointer, params)
        _told.buffers = {}
        if not self._pointer:
            raise EngineError(
                f"llama.cpp could not make a context of {size.slots} x {size.context} tokens.",
                hint="Lower --context or --slots.",
            )
        self._memory = lib.llama_get_memory(self._pointer)
        self._row = ctypes.c_float * model.vocab_size
        self.context = int(lib.llama_n_ctx_seq(self._pointer))  # tokens a sequence, as rounded by llama.cpp
        self.slots = size.slots
        self.batch = size.batch
        self.layout = f"streams, flash attention, {self.context} tokens"  # a saved state fits only this
        self.kv_type = size.kv
        self.hidden = int(lib.llama_model_n_embd(model._pointer))
        self.wants_states = False  # hidden states too, in steps whose tokens all have logits
        self.has_states = False  # the last step gave them
        self.copying = False  # a copy is ordered and not carried out yet
        self._allocate_batch(size.batch)

    def _allocate_batch(self, size: int) -> None:
        """One batch for the context's life; only its contents change from step to step."""
        self._tokens = (ctypes.c_int32 * size)()
        self._positions = (ctypes.c_int32 * size)()
        self._slot_ids = (ctypes.c_int32 * size)()
        self._slot_counts = (ctypes.c_int32 * size)(*([1] * size))
        self._outputs = (ctypes.c_int8 * size)()
        pointer = ctypes.POINTER(ctypes.c_int32)
        stride = ctypes.sizeof(ctypes.c_int32)
        start = ctypes.addressof(self._slot_ids)
        self._slot_pointers = (pointer * size)(
            *(ctypes.cast(start + index * stride, pointer) for index in range(size))
        )
        batch = self._batch = self._lib.llama_batch()
        batch.token = ctypes.cast(self._tokens, pointer)
        batch.pos = ctypes.cast(self._positions, pointer)
        batch.n_seq_id = ctypes.cast(self._slot_counts, pointer)
        batch.seq_id = ctypes.cast(self._slot_pointers, ctypes.POINTER(pointer))
        batch.logits = ctypes.cast(self._outputs, ctypes.POINTER(ctypes.c_int8))

    def adapt(self, adapter: Adapter | None, scale: float) -> None:
        """Compute with this adapter from here on, None for none; the next decode is slower for a change.

        What slots hold already stays as it was computed. Raises EngineError.
        """
        _adapt(self._lib, self._pointer, adapter, scale)

    def close(self) -> None:
        """Give the KV cache and compute buffers back; idempotent."""
        if self._pointer:
            self._lib.llama_free(self._pointer)
            self._pointer = None

    def decode(self, tokens: list[int], positions: list[int], slots: list[int], outputs: list[int]) -> int:
        """Run one batch; four parallel lists of at most `batch` entries.

        `outputs[i]` is 1 where logits are wanted. Returns llama_decode's code: 0 done, 1 no room in the KV
        cache (nothing changed), below 0 a failure.
        """
        count = len(tokens)
        columns: list[tuple[Any, list[int]]] = [
            (self._tokens, tokens),
            (self._positions, positions),
            (self._slot_ids, slots),
            (self._outputs, outputs),
        ]
        for column, values in columns:
            column[:count] = values
        self._batch.n_tokens = count
        # With states, llama.cpp would compute logits for every token of a prompt.
        states = self.wants_states and sum(outputs) == count
        if states != self.has_states:
            self.has_states = states
            self._lib.llama_set_embeddings(self._pointer, states)
        code = int(self._lib.llama_decode(self._pointer, self._batch))
        self.copying = self.copying and code != DECODE_OK
        return code

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from the next decode on."""
        self._lib.llama_set_n_threads(self._pointer, threads, threads)

    def truncate(self, slot: int, length: int) -> bool:
        """Keep the first `length` tokens of a slot. False: this model's memory cannot be cut there."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, slot, length, -1))

    def clear(self, slot: int) -> None:
        """Empty one slot."""
        self._lib.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` a copy of slot `source` (memory is copied before the next decode)."""
        self.copying = True
        self.clear(target)
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def cells(self, slot: int) -> int:
        """Tokens that a slot holds."""
        return int(self._lib.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def save(self, slot: int) -> bytearray:
        """The cells of a slot as llama.cpp writes them; empty when it cannot.

        Not while `copying`: the memory of a copied slot is not there yet.
        """
        assert not self.copying, "a copied slot is complete after the next decode"
        data = bytearray(self._lib.llama_state_seq_get_size(self._pointer, slot))
        view = (ctypes.c_uint8 * len(data)).from_buffer(data)
        written = int(self._lib.llama_state_seq_get_data(self._pointer, view, len(data), slot))
        return data if written == len(data) else bytearray()

    def restore(self, slot: int, data: bytearray) -> bool:
        """Make a slot what `save` saw, on a context of the same model and layout. False: llama.cpp
        refused the bytes, and the slot is empty.

        llama.cpp trusts much of what it reads here: `data` must be exactly what `save` gave, proven by a
        checksum. Not while `copying`: a copy out of this slot would take the new cells.
        """
        assert not self.copying, "the slot may be the source of a copy"
        self.clear(slot)
        view = (ctypes.c_uint8 * len(data)).from_buffer(data)
        if self._lib.llama_state_seq_set_data(self._pointer, view, len(data), slot) == len(data):
            return True
        self.clear(slot)
        return False

    def logits(self, index: int) -> Any:
        """Logits [vocab] float32 after batch entry `index`: a writable view, valid until the next decode."""
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self._pointer, index)
        row: Any = self._row.from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(row, np.float32)

    def state(self, index: int) -> Any:
        """Last hidden state [hidden] float32, normalized, after batch entry `index`: a view, valid until the
        next decode; only where `has_states`."""
        import numpy as np

        pointer = self._lib.llama_get_embeddings_ith(self._pointer, index)
        return np.ctypeslib.as_array(pointer, shape=(self.hidden,))


class EmbeddingContext:
    """Gives the hidden states of one text at a time; one sequence, states of every token."""

    def __init__(self, model: Model, *, context: int, batch: int, threads: int) -> None:
        lib = self._lib = model._lib
        params = lib.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = batch
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.pooling_type = _POOLING_NONE
        params.no_perf = True
        self._pointer = lib.llama_init_from_model(model._pointer, params)
        if not self._pointer:
            raise EngineError("llama.cpp could not make a context for embeddings.")
        self._width = int(lib.llama_model_n_embd(model._pointer))
        self._memory = lib.llama_get_memory(self._pointer)
        self._batch = lib.llama_batch_init(batch, 0, 1)

    def adapt(self, adapter: Adapter | None, scale: float) -> None:
        """As `Context.adapt`."""
        _adapt(self._lib, self._pointer, adapter, scale)

    def states(self, tokens: list[int], start: int) -> Any:
        """Hidden states [tokens, width] float32 of a text's tokens from position `start` on (0: a new text).

        A numpy view, valid until the next call. Raises EngineError.
        """
        import numpy as np

        if start == 0 and self._memory:
            self._lib.llama_memory_seq_rm(self._memory, 0, -1, -1)
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1
        code = int(self._lib.llama_decode(self._pointer, batch))
        if code != DECODE_OK:
            raise EngineError(
                f"The engine could not compute this embedding: decoding failed with code {code}."
            )
        pointer = self._lib.llama_get_embeddings(self._pointer)
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), self._width))

    def close(self) -> None:
        """Give the memory back; idempotent."""
        if self._pointer:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._pointer)
            self._pointer = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerOptions:
    """Numbers of one sampler chain, in llama.cpp's terms; temperature 0 is greedy."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_window: int
    logit_bias: tuple[tuple[int, float], ...]
    seed: int


class Sampler:
    """llama.cpp's sampler chain of one sequence: bias, penalties, top-k, top-p, min-p, temperature, draw."""

    def __init__(self, model: Model, options: SamplerOptions) -> None:
        lib = self._lib = model._lib
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        links = self._links(lib, model.vocab_size, options)
        self._likeliest = len(links) == 1 and options.temperature <= 0
        for link in links:
            lib.llama_sampler_chain_add(self._chain, link)

    @staticmethod
    def _links(lib: Any, vocab_size: int, options: SamplerOptions) -> list[Any]:
        links: list[Any] = []
        if options.logit_bias:
            biases = (lib.llama_logit_bias * len(options.logit_bias))(*options.logit_bias)
            links.append(lib.llama_sampler_init_logit_bias(vocab_size, len(biases), biases))
        penalties = (options.repeat_penalty, options.frequency_penalty, options.presence_penalty)
        if penalties != (1.0, 0.0, 0.0):
            links.append(lib.llama_sampler_init_penalties(vocab_size, options.penalty_window, *penalties))
        if options.temperature <= 0:
            return [*links, lib.llama_sampler_init_greedy()]
        if options.top_k > 0:
            links.append(lib.llama_sampler_init_top_k(options.top_k))
        if options.top_p < 1:
            links.append(lib.llama_sampler_init_top_p(options.top_p, 1))
        if options.min_p > 0:
            links.append(lib.llama_sampler_init_min_p(options.min_p, 1))
        links.append(lib.llama_sampler_init_temp(options.temperature))
        links.append(lib.llama_sampler_init_dist(options.seed))
        return links

    def sample(self, context: Context, index: int) -> int:
        """Draw the token after batch entry `index` and tell the chain of it."""
        if self._likeliest:  # what the greedy chain gives, without its copy of the whole vocabulary
            return int(context.logits(index).argmax())
        return int(self._lib.llama_sampler_sample(self._chain, context._pointer, index))

    def accept(self, token: int) -> None:
        """Tell the chain of a token that it did not draw (the prompt, for penalties)."""
        self._lib.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        """Free the chain; idempotent."""
        if self._chain:
            self._lib.llama_sampler_free(self._chain)
            self._chain = None
