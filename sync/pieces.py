"""How one chunk is kept in a pack: as it is, compressed, or as its difference to an older chunk.

Quantized weights hardly compress as they stand (0.96 of their size), since scales and values alternate
within each block. With byte i of every block beside each other, Q4_1 comes to 0.91 and bfloat16 to 0.70; a
chunk that gains nothing by it is kept as it is. A difference is the XOR with the same place of the same
tensor in an older version: where training moved weights a little, most of its bits are zero (see decision 9
for the numbers).

`unpack` takes bytes from a mirror: nothing is allocated by what they say of themselves, and the caller
compares the sha256 of what comes out.
"""

from __future__ import annotations

from lichen.errors import SourceError
from lichen.sync.extra import of_the_extra

LEVEL = 3  # of zstd; 9 gains less than 1 % more on weights at a fifth of the speed
WORTH = 0.97  # a compressed form has to be smaller than this part of the chunk, or it is not worth unpacking
DELTA_WORTH = 0.9  # a difference has to be smaller than this part of what the chunk takes without it


def pack(data: bytes, block: int) -> tuple[bytes, int]:
    """The smaller form of a chunk: stored bytes and stride (0 as it is, 1 zstd, n zstd over n byte planes).

    block: bytes of a block of its type, 1 where there is none.
    """
    compressed = _compress(_planes(data, block))
    return (compressed, block) if len(compressed) < len(data) * WORTH else (data, 0)


def pack_delta(data: bytes, base: bytes, block: int, alone: int) -> tuple[bytes, int] | None:
    """The difference to `base`, of equal length, as stored bytes and stride; None if it does not pay.

    alone: bytes that the chunk takes without it.
    """
    compressed = _compress(_planes(_xor(data, base), block))
    return (compressed, block) if len(compressed) < alone * DELTA_WORTH else None


def unpack(stored: bytes, stride: int, length: int, base: bytes | None = None) -> bytes:
    """The `length` bytes of a chunk. Raises SourceError when `stored` would give another number of bytes."""
    data = stored if stride == 0 else _from_planes(_decompress(stored, length), stride)
    if len(data) != length or (base is not None and len(base) != length):
        raise SourceError(f"A piece has {len(data)} bytes, but {length} were promised.")
    return data if base is None else _xor(data, base)


def _compress(data: bytes) -> bytes:
    with of_the_extra():
        import zstandard

    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False).compress(data)


def _decompress(stored: bytes, length: int) -> bytes:
    """One zstd frame whose header promises `length` bytes; zstd itself never writes more than it promises."""
    with of_the_extra():
        import zstandard

    try:
        if zstandard.get_frame_parameters(stored).content_size != length:
            raise SourceError(f"A compressed piece does not say that it has {length} bytes.")
        return zstandard.ZstdDecompressor(max_window_size=8 << 20).decompress(
            stored, max_output_size=length, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise SourceError(f"A compressed piece is damaged: {error}.") from error


def _planes(data: bytes, stride: int) -> bytes:
    """Byte i of every `stride` bytes beside each other; what is left over of the last ones follows."""
    if stride == 1:
        return data
    import numpy as np

    rows = len(data) // stride
    table = np.frombuffer(data, np.uint8, rows * stride).reshape(rows, stride)
    return table.T.tobytes() + data[rows * stride :]


def _from_planes(data: bytes, stride: int) -> bytes:
    if stride == 1:
        return data
    import numpy as np

    rows = len(data) // stride
    table = np.frombuffer(data, np.uint8, rows * stride).reshape(stride, rows)
    return table.T.tobytes() + data[rows * stride :]


def _xor(left: bytes, right: bytes) -> bytes:
    import numpy as np

    return np.bitwise_xor(np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8)).tobytes()
