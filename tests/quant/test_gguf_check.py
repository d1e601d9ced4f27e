"""The check in front of the native loader: sound, malformed, hostile and mutated files."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.errors import ModelFileError
from lichen.quant.gguf_check import check_gguf
from tests.quant.tiny_gguf import METADATA, TOKENS, WIDTH, tiny_gguf


def check(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    check_gguf(path)


def changed(**keys: tuple[int, Any] | None) -> bytes:
    """The small file with some metadata replaced (dots as double underscores) or removed."""
    metadata = dict(METADATA)
    for name, content in keys.items():
        key = name.replace("__", ".")
        if content is None:
            del metadata[key]
        else:
            metadata[key] = content
    return tiny_gguf(metadata=metadata)


def test_the_default_model_is_sound(model_path: Path) -> None:
    summary = check_gguf(model_path)
    assert (summary.architecture, summary.tensor_count, summary.context_train) == ("llama", 272, 8192)
    assert summary.parameter_count == 134_515_008


def test_a_small_file_is_sound(tmp_path: Path) -> None:
    check(tmp_path, tiny_gguf())


EMBEDDING = ("token_embd.weight", [WIDTH, 4], 0, 0)

FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes"),
    "no GGUF": (tiny_gguf(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (tiny_gguf(version=1), "version 1"),
    "big endian": (tiny_gguf(version=3 << 24), "big endian"),
    "too many tensors": (tiny_gguf(tensor_count=1 << 60), "number of tensors"),
    "too many keys": (tiny_gguf(key_count=1 << 40), "number of metadata keys"),
    "more keys than there are": (tiny_gguf(key_count=12), "not a sound GGUF"),
    "unknown value type": (
        changed(general__name=(4, 1)).replace(b"general.name\x04", b"general.name\x63"),
        "type 99",
    ),
    "bool of 2": (changed(x__y=(7, 2)), "true or false"),
    "nested array": (
        changed(x__y=(9, (4, []))).replace(b"x.y\x09\0\0\0\x04", b"x.y\x09\0\0\0\x09"),
        "unsupported type 9",
    ),
    "no architecture": (changed(general__architecture=None), "general.architecture"),
    "architecture is a number": (changed(general__architecture=(4, 7)), "general.architecture"),
    "no layers": (changed(llama__block_count=(4, 0)), "block_count"),
    "a million layers": (changed(llama__block_count=(4, 1_000_000)), "block_count"),
    "width is a text": (changed(llama__embedding_length=(8, "x")), "embedding_length"),
    "no heads": (changed(llama__attention__head_count=(4, 0)), "head_count"),
    "heads that do not divide": (changed(llama__attention__head_count_kv=(4, 3)), "do not fit"),
    "token id out of range": (changed(tokenizer__ggml__bos_token_id=(4, 4)), "bos_token_id"),
    "token types too short": (changed(tokenizer__ggml__token_type=(9, (5, [1]))), "token_type"),
    "more tokens than embeddings": (changed(tokenizer__ggml__tokens=(9, (8, [*TOKENS, "c"]))), "embeddings"),
    "tokens are numbers": (changed(tokenizer__ggml__tokens=(9, (4, [1]))), "list of tokens"),
    "template is a number": (changed(tokenizer__chat_template=(4, 1)), "not a text"),
    "alignment of 3": (changed(general__alignment=(4, 3)), "alignment"),
    "no embedding": (tiny_gguf(tensors=[("output.weight", [WIDTH, 4], 0, 0)]), "token_embd.weight"),
    "tensor without dimensions": (tiny_gguf(tensors=[("token_embd.weight", [], 0, 0)]), "0 dimensions"),
    "tensor of five dimensions": (tiny_gguf(tensors=[("token_embd.weight", [1] * 5, 0, 0)]), "5 dimensions"),
    "tensor of no size": (tiny_gguf(tensors=[("token_embd.weight", [WIDTH, 0], 0, 0)]), "impossible shape"),
    "tensor that overflows": (
        tiny_gguf(tensors=[("token_embd.weight", [1 << 40, 1 << 40], 0, 0)]),
        "impossible",
    ),
    "unknown tensor type": (tiny_gguf(tensors=[("token_embd.weight", [WIDTH, 4], 77, 0)]), "unknown type 77"),
    "broken block": (tiny_gguf(tensors=[("token_embd.weight", [33, 4], 2, 0)]), "no multiple"),
    "offset not aligned": (tiny_gguf(tensors=[("token_embd.weight", [WIDTH, 4], 0, 7)]), "offset 7"),
    "offset past the end": (tiny_gguf(tensors=[("token_embd.weight", [WIDTH, 4], 0, 1 << 50)]), "offset"),
    "overlap": (tiny_gguf(tensors=[EMBEDDING, ("b", [WIDTH], 0, 32)]), "overlaps"),
    "gap": (tiny_gguf(tensors=[EMBEDDING, ("b", [WIDTH], 0, 1024)]), "gap"),
    "same name twice": (tiny_gguf(tensors=[EMBEDDING, ("token_embd.weight", [WIDTH], 0, 512)]), "same name"),
    "long tensor name": (tiny_gguf(tensors=[("x" * 64, [WIDTH], 0, 0)]), "64 bytes"),
    "cut off": (tiny_gguf(data_bytes=100), "cut off"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(tmp_path: Path, fault: str) -> None:
    data, words = FAULTS[fault]
    with pytest.raises(ModelFileError, match=words):
        check(tmp_path, data)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(ModelFileError, match="is not a file"):
            check_gguf(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_give_a_verdict(tmp_path: Path, data: st.DataObject) -> None:
    """Flipped, cut and inserted bytes in a sound file, and plain noise: a summary or a ModelFileError."""
    sound = bytearray(tiny_gguf())
    for _ in range(data.draw(st.integers(0, 6))):
        sound[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    noise = data.draw(st.binary(max_size=64))
    cut = data.draw(st.integers(0, len(sound)))
    with contextlib.suppress(ModelFileError):
        check(tmp_path, bytes(sound[:cut]) + noise)


CHILD = """
import os, random, sys
from pathlib import Path
from lichen.errors import ModelFileError
from lichen.quant.gguf_check import check_gguf
from lichen.runtime.native import Model

source, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
header = source.open("rb").read(2_000_000)
size = source.stat().st_size
chance = random.Random(5)
refused = loaded = 0
for number in range(count):
    path = folder / f"{number}.gguf"
    mutated = bytearray(header)
    kind = number % 4
    if kind == 0:    # a few bits anywhere in the header
        for _ in range(chance.randrange(1, 8)):
            mutated[chance.randrange(len(mutated) // 2)] ^= 1 << chance.randrange(8)
    elif kind == 1:  # lies in the first keys: counts, lengths, types, values
        at = chance.randrange(8, 1500)
        mutated[at] = chance.choice([0, 1, 2, 4, 9, 127, 128, 255])
    elif kind == 2:  # a whole 8-byte number replaced
        at = chance.randrange(8, 1400)
        lie = chance.choice([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
        mutated[at : at + 8] = lie.to_bytes(8, "little")
    else:            # lies in the tensor table, which ends the header
        at = 1_700_000 + chance.randrange(50_000)
        mutated[at] ^= 1 << chance.randrange(8)
    with path.open("wb") as file:
        file.write(mutated)
        file.truncate(size if number % 5 else chance.randrange(size))
    child = os.fork()
    if child == 0:
        try:
            check_gguf(path)
            Model(path).close()
        except ModelFileError:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    path.unlink()
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) not in (0, 3):
        print(f"mutation {number} of kind {kind} ended with status {status}")
        sys.exit(1)
    refused, loaded = refused + (os.WEXITSTATUS(status) == 3), loaded + (os.WEXITSTATUS(status) == 0)
print(refused, loaded)
"""


def test_sixty_mutations_of_the_real_model_never_crash_the_process(model_path: Path, tmp_path: Path) -> None:
    """Each is checked, and loaded by llama.cpp if it passes, in a process of its own (weights are sparse)."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(model_path), str(tmp_path), "60"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    refused, loaded = map(int, done.stdout.split())
    assert refused + loaded == 60
    assert refused > 20


def test_truncations_of_the_real_model_are_refused(model_path: Path, tmp_path: Path) -> None:
    size = model_path.stat().st_size
    chance = random.Random(3)
    path = tmp_path / "cut.gguf"
    with model_path.open("rb") as file:
        header = file.read(2_000_000)
    for length in [1, 23, 24, 100, size - 1, *(chance.randrange(size) for _ in range(10))]:
        path.write_bytes(header[:length])
        with path.open("r+b") as cut:
            cut.truncate(length)
        with pytest.raises(ModelFileError):
            check_gguf(path)
