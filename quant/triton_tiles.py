"""The GPU kernels: one decoder a GGUF format, and the two products that read weights through it.

A weight stays in the file's own bytes, one row after the other. A decoder turns groups of 32 columns into
numbers, the step that all five formats share: Q4_0, Q4_1 and Q8_0 hold one group in a block, Q4_K and
Q6_K eight. It gets `row`, pointers to the first byte of each row, [R, 1, 1], `group`, the numbers of the
groups, [1, G, 1], and `inside`, which of these exist, [R, G, 1]; it gives fp32 [R, G, 32] and reads nothing
outside. Layouts and arithmetic are ggml's (`ggml-common.h`, `dequantize_row_*` of `ggml-quants.c`).

Scales are fp16 at offsets that are even but often not multiples of 4 (blocks of 18, 20, 34, 144 and 210
bytes), so they are read as one aligned 16-bit word each; all else is read byte by byte. Row offsets are
64-bit, since an embedding table may pass 2 GB.

Imports triton, so only `triton_kernels` imports this module, and only when a product is asked for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _half(at, inside):
    """The fp16 numbers at even addresses `at`, as fp32."""
    return tl.load(at.to(tl.pointer_type(tl.float16)), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _byte(at, inside):
    """The bytes at `at`, as int32."""
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _signed(byte):
    """A byte read as int8."""
    return (byte ^ 128) - 128


@triton.jit
def decode_q4_0(row, group, inside):
    """18 bytes: fp16 scale, 16 bytes of codes. Low nibbles are columns 0-15, high ones 16-31."""
    column = tl.arange(0, 32)[None, None, :]
    block = row + group * 18
    code = (_byte(block + 2 + column % 16, inside) >> (column // 16 * 4)) & 15
    return (code - 8).to(tl.float32) * _half(block, inside)


@triton.jit
def decode_q4_1(row, group, inside):
    """20 bytes: fp16 scale, fp16 minimum, 16 bytes of codes as in Q4_0."""
    column = tl.arange(0, 32)[None, None, :]
    block = row + group * 20
    code = (_byte(block + 4 + column % 16, inside) >> (column // 16 * 4)) & 15
    return code.to(tl.float32) * _half(block, inside) + _half(block + 2, inside)


@triton.jit
def decode_q8_0(row, group, inside):
    """34 bytes: fp16 scale, 32 signed codes."""
    column = tl.arange(0, 32)[None, None, :]
    block = row + group * 34
    return _signed(_byte(block + 2 + column, inside)).to(tl.float32) * _half(block, inside)


@triton.jit
def decode_q4_k(row, group, inside):
    """144 bytes: fp16 scale of scales, fp16 scale of minima, 12 bytes of 6-bit pairs, 128 bytes of codes.

    Two groups share 32 bytes of codes, the even one in the low nibbles. Groups 0-3 have scale and minimum in
    the low six bits of bytes i and i + 4; groups 4-7 have four bits of each in byte i + 4 and the upper two
    in the top of bytes i - 4 and i.
    """
    column = tl.arange(0, 32)[None, None, :]
    block = row + group // 8 * 144
    i = group % 8
    packed = block + 4
    early = i < 4
    scale_byte = _byte(packed + i % 4, inside)
    minimum_byte = _byte(packed + 4 + i % 4, inside)
    both = _byte(packed + 8 + i % 4, inside & ~early)
    scale = tl.where(early, scale_byte & 63, (both & 15) | (scale_byte >> 6 << 4))
    minimum = tl.where(early, minimum_byte & 63, (both >> 4) | (minimum_byte >> 6 << 4))
    code = (_byte(block + 16 + i // 2 * 32 + column, inside) >> (i % 2 * 4)) & 15
    step = scale.to(tl.float32) * _half(block, inside)
    return code.to(tl.float32) * step - minimum.to(tl.float32) * _half(block + 2, inside)


@triton.jit
def decode_q6_k(row, group, inside):
    """210 bytes: 128 of low nibbles, 64 of upper bit pairs, 16 signed scales, fp16 scale of scales.

    Four groups share 64 bytes of nibbles and 32 of bit pairs: groups 0 and 1 the low nibbles of the first and
    second 32 bytes, groups 2 and 3 the high ones; group i the bits 2i and 2i + 1. A scale serves 16 columns.
    """
    column = tl.arange(0, 32)[None, None, :]
    block = row + group // 8 * 210
    half = group % 8 // 4
    i = group % 4
    nibble = (_byte(block + half * 64 + i % 2 * 32 + column, inside) >> (i // 2 * 4)) & 15
    pair = (_byte(block + 128 + half * 32 + column, inside) >> (i * 2)) & 3
    scales = block + 192 + half * 8 + i * 2
    scale = _signed(tl.where(column < 16, _byte(scales, inside), _byte(scales + 1, inside)))
    step = scale.to(tl.float32) * _half(block + 208, inside)
    return ((nibble | pair << 4) - 32).to(tl.float32) * step


@triton.jit
def _weight_tile(
    weights,
    row,
    column,
    rows,
    columns,
    row_bytes,
    DECODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows `row` to `row + ROWS` and columns `column` to `column + COLUMNS` in fp32; zeros past the edges."""
    at = row + tl.arange(0, ROWS)[:, None, None]
    group = column // 32 + tl.arange(0, COLUMNS // 32)[None, :, None]
    inside = (at < rows) & (group < columns // 32)
    return DECODE(weights + at.to(tl.int64) * row_bytes, group, inside).reshape(ROWS, COLUMNS)


@triton.jit
def _dense_tile(matrix, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers into a dense [rows, columns] matrix for a tile [ROWS, COLUMNS], and which of them exist."""
    down = row + tl.arange(0, ROWS)[:, None]
    across = column + tl.arange(0, COLUMNS)[None, :]
    return matrix + down.to(tl.int64) * columns + across, (down < rows) & (across < columns)


@triton.jit
def _add_product(total, left, tile, WIDE: tl.constexpr):
    """total + left @ tile, with the tile rounded to left's dtype; WIDE multiplies these numbers as fp32."""
    tile = tile.to(left.dtype)
    if WIDE:
        return tl.dot(left.to(tl.float32), tile.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, tile, total)


# One program makes one tile of the result. Tokens are the fast axis of the grid, so that programs that run
# together read the same weights, and the second reader finds them in the cache.


@triton.jit(do_not_specialize=["tokens"])
def forward(
    x, weights, y, tokens, rows, columns, row_bytes,
    DECODE: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[tokens, rows] = x[tokens, columns] @ W^T, summed in fp32 over tiles of columns."""
    token = tl.program_id(0) * TOKENS
    row = tl.program_id(1) * ROWS
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for column in range(0, columns, COLUMNS):
        at, inside = _dense_tile(x, token, column, tokens, columns, TOKENS, COLUMNS)
        left = tl.load(at, mask=inside, other=0.0)
        tile = _weight_tile(weights, row, column, rows, columns, row_bytes, DECODE, ROWS, COLUMNS)
        total = _add_product(total, left, tile.trans(), WIDE)
    at, inside = _dense_tile(y, token, row, tokens, rows, TOKENS, ROWS)
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def backward(
    dy, weights, dx, tokens, rows, columns, row_bytes,
    DECODE: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx[tokens, columns] = dy[tokens, rows] @ W, summed in fp32 over tiles of rows."""
    token = tl.program_id(0) * TOKENS
    column = tl.program_id(1) * COLUMNS
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for row in range(0, rows, ROWS):
        at, inside = _dense_tile(dy, token, row, tokens, rows, TOKENS, ROWS)
        left = tl.load(at, mask=inside, other=0.0)
        tile = _weight_tile(weights, row, column, rows, columns, row_bytes, DECODE, ROWS, COLUMNS)
        total = _add_product(total, left, tile, WIDE)
    at, inside = _dense_tile(dx, token, column, tokens, columns, TOKENS, COLUMNS)
    tl.store(at, total.to(dx.dtype.element_ty), mask=inside)
