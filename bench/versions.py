"""Versions of a model as publishers make them: a few tensors changed, all of them a little, or requantized."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from lichen.quant.formats import GGMLType
from lichen.quant.gguf import open_gguf, write_gguf
from lichen.quant.gguf_check import tensor_places
from lichen.quant.gguf_write import TensorItem

NUDGE = 1e-3  # a merged adapter's part of the weights' spread
RANK = 8


def changed(source: Path, target: Path, names: set[str], *, nudge: float | None, seed: int) -> None:
    """A copy in which the named tensors are trained a little (nudge), or wholly new bytes (None)."""
    random = np.random.default_rng(seed)
    target.write_bytes(source.read_bytes())
    reader = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    with target.open("r+b") as file:
        for place in tensor_places(source):
            if place.name not in names:
                continue
            tensor = reader[place.name]
            if nudge is None:
                data = random.bytes(place.size)
            else:
                values = dequantize(tensor.data, tensor.tensor_type)
                data = quantize(_moved(values, nudge, random), tensor.tensor_type).tobytes()
            file.seek(place.offset)
            file.write(data)


def converted(source: Path, target: Path, kind: str, *, nudge: float = 0, grid: bool = True) -> None:
    """The model with all matrices in the type `kind`, moved by `nudge` of their spread before.

    grid=False first takes the weights off the grid of their quantization, so that they compress like trained ones.
    """
    wanted = GGMLQuantizationType[kind]
    reader = GGUFReader(source)
    rest, moves = np.random.default_rng(0), np.random.default_rng(1)
    tensors = []
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            tensors.append((tensor.name, tensor.shape, "F32", values.tobytes()))
            continue
        if not grid:
            values = values + rest.standard_normal(values.shape, np.float32) * values.std() * 0.08
        if nudge:
            values = _moved(values, nudge, moves)
        tensors.append((tensor.name, tensor.shape, kind, quantize(values, wanted).tobytes()))
    start = min(place.offset for place in tensor_places(source))
    with source.open("rb") as old, target.open("wb") as file:
        for part in _rewritten(old.read(start), reader, tensors):
            file.write(part)


def templated(source: Path, target: Path, template: bytes) -> None:
    """A copy with another chat template, which moves everything behind it."""
    reader = GGUFReader(source)
    field = reader.fields["tokenizer.chat_template"]
    old = bytes(field.parts[-1])
    data = source.read_bytes()
    first = min(place.offset for place in tensor_places(source))
    header_end = _header_end(reader)
    packed = struct.pack("<Q", len(old)) + old
    header = data[:header_end].replace(packed, struct.pack("<Q", len(template)) + template, 1)
    target.write_bytes(header + bytes(-len(header) % 32) + data[first:])


def gigabyte(path: Path) -> None:
    """A GGUF of 64 tensors of 16 MiB, normally distributed half-precision weights, that no engine has to load."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    for layer in range(64):
        values = random.standard_normal((2048, 4096), np.float32) * 0.02
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _moved(values: np.ndarray, nudge: float, random: np.random.Generator) -> np.ndarray:
    """Weights [rows, columns] plus a low-rank change, as merging an adapter makes it."""
    values = values.astype(np.float32)
    flat = values.reshape(values.shape[0], -1)
    change = random.standard_normal((flat.shape[0], RANK), np.float32) @ random.standard_normal(
        (RANK, flat.shape[1]), np.float32
    )
    moved: np.ndarray = flat + change / change.std() * values.std() * nudge
    return moved.reshape(values.shape).astype(np.float32)


def _header_end(reader: GGUFReader) -> int:
    last = reader.tensors[-1].field
    return int(last.offset + sum(part.nbytes for part in last.parts))


def _rewritten(
    header: bytes, reader: GGUFReader, tensors: list[tuple[str, np.ndarray, str, bytes]]
) -> Iterator[bytes]:
    """The metadata as it was, a new list of tensors, and their bytes at multiples of 32."""
    listed = int(reader.tensors[0].field.offset)
    lines, at = [], 0
    for name, shape, kind, data in tensors:
        label = name.encode()
        lines.append(struct.pack("<Q", len(label)) + label + struct.pack("<I", len(shape)))
        lines.append(struct.pack(f"<{len(shape)}QIQ", *map(int, shape), GGMLType[kind], at))
        at += -(-len(data) // 32) * 32
    head = header[:listed] + b"".join(lines)
    yield head + bytes(-len(head) % 32)
    for _, _, _, data in tensors:
        yield data + bytes(-len(data) % 32)


def adapter(model: Path, path: Path, seed: int) -> Path:
    """An adapter on every linear layer of the upper half, as `lichen learn` makes them."""
    source = np.random.default_rng(seed)
    items: list[TensorItem] = []
    with open_gguf(model) as file:
        architecture = str(file.metadata["general.architecture"].content)
        first = int(file.metadata[f"{architecture}.block_count"].content) // 2
        for name, tensor in file.tensors.items():
            if name.startswith("blk.") and len(tensor.shape) == 2 and int(name.split(".")[1]) >= first:
                outputs, inputs = tensor.shape
                for end, shape in (("a", (RANK, inputs)), ("b", (outputs, RANK))):
                    numbers = (source.standard_normal(shape) * 0.01).astype(np.float32)
                    items.append((f"{name}.lora_{end}", GGMLType.F32, shape, numbers))
    said = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(RANK),
    }
    write_gguf(path, said, items)
    return path
