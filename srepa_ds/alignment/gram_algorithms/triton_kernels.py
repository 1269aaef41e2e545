"""Triton kernels for the structural losses: one program per image and block of rows.

A program walks over blocks of columns. For each it forms a tile of the Gram matrices from chunks of
the width, uses it, and drops it; no tile is ever written to memory. Rows and columns beyond the
last token are masked by index. Nothing is summed with atomics: each output row has one writer, so
results are the same in every run.

The gradient rows of a program (64 x up to 1536) fit neither registers nor shared memory beside the
tile. They are accumulated in global memory, which stays in L2: per column block that costs twice
64 x width of traffic, about two fifths on top of what is read anyway. Splitting the width over
programs would keep them in registers, but each program would form every tile again, more than
twice the arithmetic. Using the symmetry of the tile would need a second writer for each row.
"""

from typing import no_type_check

import triton
import triton.language as tl

# Decided when the functions below are decorated; the variable TRITON_INTERPRET has no effect later.
INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit
@no_type_check
def _add_gram(tile, tokens, rows, columns, num_tokens, width, CHUNK, PRECISION):
    """Returns tile + tokens[rows] tokens[columns]', for the tokens of one image."""
    left_rows = tokens + rows.to(tl.int64)[:, None] * width
    right_rows = tokens + columns.to(tl.int64)[:, None] * width
    for start in range(0, width, CHUNK):
        channels = start + tl.arange(0, CHUNK)[None, :]
        in_width = channels < width
        left = tl.load(left_rows + channels, (rows < num_tokens)[:, None] & in_width, 0.0)
        right = tl.load(right_rows + channels, (columns < num_tokens)[:, None] & in_width, 0.0)
        tile = tl.dot(left, tl.trans(right), tile, input_precision=PRECISION, out_dtype=tile.dtype)
    return tile


@triton.jit
@no_type_check
def _add_weighted_tokens(
    gradient, weights, tokens, rows, columns, num_tokens, width, CHUNK, PRECISION
):
    """Adds weights tokens[columns] to gradient[rows] in memory, rows of this program alone."""
    gradient_rows = gradient + rows.to(tl.int64)[:, None] * width
    token_rows = tokens + columns.to(tl.int64)[:, None] * width
    for start in range(0, width, CHUNK):
        channels = start + tl.arange(0, CHUNK)[None, :]
        in_width = channels < width
        written = (rows < num_tokens)[:, None] & in_width
        chunk = tl.load(token_rows + channels, (columns < num_tokens)[:, None] & in_width, 0.0)
        before = tl.load(gradient_rows + channels, written, 0.0)
        after = tl.dot(weights, chunk, before, input_precision=PRECISION, out_dtype=weights.dtype)
        tl.store(gradient_rows + channels, after, written)
    # The next block of columns may read a row from another thread than the one that wrote it.
    tl.debug_barrier()


@triton.jit
@no_type_check
def _place(num_tokens, ROWS: tl.constexpr):
    """Returns this program's image, as int64 since images may begin beyond 2^31, and its rows."""
    num_blocks = tl.cdiv(num_tokens, ROWS)
    image = (tl.program_id(0) // num_blocks).to(tl.int64)
    return image, tl.program_id(0) % num_blocks * ROWS + tl.arange(0, ROWS)


@triton.jit
@no_type_check
def mse_kernel(
    student,
    teacher,
    row_values,
    gradient,
    num_tokens,
    d_student,
    d_teacher,
    WITH_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes each row's sum of (S^S_ij - S^T_ij)^2 and adds its gradient to zeros in memory."""
    image, rows = _place(num_tokens, ROWS)
    student += image * num_tokens * d_student
    teacher += image * num_tokens * d_teacher
    gradient += image * num_tokens * d_student
    value = tl.zeros((ROWS,), tl.float64)
    for first in range(0, num_tokens, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        tile = tl.zeros((ROWS, COLUMNS), student.dtype.element_ty)
        tile = -_add_gram(tile, teacher, rows, columns, num_tokens, d_teacher, CHUNK, PRECISION)
        tile = _add_gram(tile, student, rows, columns, num_tokens, d_student, CHUNK, PRECISION)
        tile = tl.where(rows[:, None] == columns[None, :], 0.0, tile)
        value += tl.sum(tile * tile, 1).to(tl.float64)
        if WITH_GRADIENT:
            tile *= 4.0
            _add_weighted_tokens(
                gradient, tile, student, rows, columns, num_tokens, d_student, CHUNK, PRECISION
            )
    tl.store(row_values + image * num_tokens + rows, value, rows < num_tokens)


@triton.jit
@no_type_check
def _logits(tokens, scale, rows, columns, num_tokens, width, CHUNK, PRECISION):
    """Returns a tile of the Gram matrix over its temperature."""
    tile = tl.zeros((rows.shape[0], columns.shape[0]), tokens.dtype.element_ty)
    return _add_gram(tile, tokens, rows, columns, num_tokens, width, CHUNK, PRECISION) * scale


@triton.jit
@no_type_check
def _without_self(logits, rows, columns, num_tokens):
    """Returns logits with -inf on the diagonal and in columns beyond the last token."""
    is_pair = (rows[:, None] != columns[None, :]) & (columns < num_tokens)[None, :]
    return tl.where(is_pair, logits, -float("inf"))


@triton.jit
@no_type_check
def kl_rows_kernel(
    student,
    teacher,
    row_values,
    statistics,
    num_tokens,
    d_student,
    d_teacher,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes each row's KL(P^T || P^S) and the statistics of its softmax.

    `statistics` is (images, 4, tokens): maximum and 1 / sum exp(logit - maximum) of the student's
    rows, then of the teacher's. A log-sum-exp would be one number instead of two, but its rounding
    enters every probability of the row, and the gradient is the small difference of two.
    """
    image, rows = _place(num_tokens, ROWS)
    student += image * num_tokens * d_student
    teacher += image * num_tokens * d_teacher
    dtype = student.dtype.element_ty
    top_student = tl.full((ROWS,), -float("inf"), dtype)
    top_teacher = tl.full((ROWS,), -float("inf"), dtype)
    mass_student = tl.zeros((ROWS,), dtype)
    mass_teacher = tl.zeros((ROWS,), dtype)
    moment = tl.zeros((ROWS,), dtype)
    # The first block holds another token of every row, so all maxima are finite after it.
    for first in range(0, num_tokens, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        s = _logits(student, STUDENT_SCALE, rows, columns, num_tokens, d_student, CHUNK, PRECISION)
        t = _logits(teacher, TEACHER_SCALE, rows, columns, num_tokens, d_teacher, CHUNK, PRECISION)
        gap = t - s
        s = _without_self(s, rows, columns, num_tokens)
        t = _without_self(t, rows, columns, num_tokens)

        top = tl.maximum(top_student, tl.max(s, 1))
        mass_student = mass_student * tl.exp(top_student - top)
        mass_student += tl.sum(tl.exp(s - top[:, None]), 1)
        top_student = top

        top = tl.maximum(top_teacher, tl.max(t, 1))
        decay = tl.exp(top_teacher - top)
        weights = tl.exp(t - top[:, None])
        mass_teacher = mass_teacher * decay + tl.sum(weights, 1)
        moment = moment * decay + tl.sum(weights * gap, 1)
        top_teacher = top
    # sum_j P^T (t - s) - lse_t + lse_s cancels, and the fast float32 logarithm is a coarse one.
    ratio = mass_teacher.to(tl.float64) / mass_student.to(tl.float64)
    value = moment.to(tl.float64) / mass_teacher.to(tl.float64)
    value -= (top_teacher - top_student).to(tl.float64) + tl.log(ratio)

    exists = rows < num_tokens
    row_values += image * num_tokens
    tl.store(row_values + rows, value, exists)
    statistics += image * 4 * num_tokens
    tl.store(statistics + rows, top_student, exists)
    tl.store(statistics + num_tokens + rows, 1.0 / mass_student, exists)
    tl.store(statistics + 2 * num_tokens + rows, top_teacher, exists)
    tl.store(statistics + 3 * num_tokens + rows, 1.0 / mass_teacher, exists)


@triton.jit
@no_type_check
def _both_ways(logits, statistics, rows, columns, num_tokens):
    """Returns P_ij + P_ji of a tile, from its symmetric logits."""
    row_top = tl.load(statistics + rows, rows < num_tokens, 0.0)
    row_share = tl.load(statistics + num_tokens + rows, rows < num_tokens, 0.0)
    column_top = tl.load(statistics + columns, columns < num_tokens, 0.0)
    column_share = tl.load(statistics + num_tokens + columns, columns < num_tokens, 0.0)
    forth = tl.exp(logits - row_top[:, None]) * row_share[:, None]
    return forth + tl.exp(logits - column_top[None, :]) * column_share[None, :]


@triton.jit
@no_type_check
def kl_gradient_kernel(
    student,
    teacher,
    statistics,
    gradient,
    num_tokens,
    d_student,
    d_teacher,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds (E + E') S / tau_student with E = P^S - P^T to zeros in memory."""
    image, rows = _place(num_tokens, ROWS)
    student += image * num_tokens * d_student
    teacher += image * num_tokens * d_teacher
    gradient += image * num_tokens * d_student
    student_rows = statistics + image * 4 * num_tokens
    teacher_rows = student_rows + 2 * num_tokens
    for first in range(0, num_tokens, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        s = _logits(student, STUDENT_SCALE, rows, columns, num_tokens, d_student, CHUNK, PRECISION)
        s = _without_self(s, rows, columns, num_tokens)
        excess = _both_ways(s, student_rows, rows, columns, num_tokens)
        t = _logits(teacher, TEACHER_SCALE, rows, columns, num_tokens, d_teacher, CHUNK, PRECISION)
        t = _without_self(t, rows, columns, num_tokens)
        excess -= _both_ways(t, teacher_rows, rows, columns, num_tokens)
        excess *= STUDENT_SCALE
        _add_weighted_tokens(
            gradient, excess, student, rows, columns, num_tokens, d_student, CHUNK, PRECISION
        )
