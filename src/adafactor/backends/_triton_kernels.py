"""Sweep, finalize and apply for GPUs, in Triton: a translation of reference.py, whose comments stand at the same steps.

One launch serves any number of parameters. A program takes one item of a list, `parameter << 32 | index`, and finds
all it needs in the parameter's row of the table (`_records.FIELDS`, then `CUT`). How a parameter is cut depends on its
shape alone, and sums have a fixed order, so results do not depend on what else is in the launch.

    sweep       strip of whole rows (of elements of a full V): R; column sums of g^2 and g^2 / R, one pair per strip
    finalize    chunk of columns: the sums over all strips; C, 1 / sqrt(C) and its part of mean(U^2)
    apply       block of whole rows: RMS(U), the step size; U, momentum, decay; p and the state are committed

Arithmetic is float32, without fusion; what there is one of per parameter is float64.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false

import triton
import triton.language as tl

from adafactor.backends._records import BYTES, FIELDS

# How a parameter is cut, and where its part of the scratch begins, in numbers from the wave's.
CUT = (
    "lr_at",  # address of a float64 lr on the device, or 0
    *("strip_rows", "strips", "block_rows", "blocks", "chunks", "padded", "width"),
    *("partial_at", "strip_at", "row_at", "col_at", "root_at", "chunk_at", "total_at"),
)
ROW_BYTES = BYTES + 8 * len(CUT)

TILE = 8192  # elements that a program has in registers at once
PANEL = 2048  # columns of a tile, at most, where a row needs several
CHUNK = 128  # columns that one program of finalize takes
FULL = 1 << 15  # elements of a full V that one program takes; known to the compiler, so that loads are vectors
WIDTHS = (64, 256, 1024, 2048, 4096, 8192)  # of a tile in a sweep; wider rows are read twice
NARROW = (64, 256, 1024)  # of a tile in apply; wider rows are cut into panels
GROUP = 128  # columns that share a scale of one-byte momentum
SWEEP_WARPS, WARPS = 16, 8

_W = tl.constexpr(ROW_BYTES // 8)
_TILE = tl.constexpr(TILE)
_PANEL = tl.constexpr(PANEL)
_CHUNK = tl.constexpr(CHUNK)
_FULL = tl.constexpr(FULL)
_GROUP = tl.constexpr(GROUP)
_F = {name: tl.constexpr(index) for index, name in enumerate(FIELDS + CUT)}

_G, _SUMS, _NEW_R, _LR = _F["g"], _F["sums"], _F["new_r"], _F["lr"]
_P, _LOW, _LOWEST, _M, _M_SCALE = _F["p"], _F["low"], _F["lowest"], _F["m"], _F["m_scale"]
_R, _C, _STEP, _REPORT, _PARAM_SQ = _F["r"], _F["c"], _F["step"], _F["report"], _F["param_sq"]
_MATRICES, _ROWS, _COLS = _F["matrices"], _F["rows"], _F["cols"]
_WHOLE_ROWS, _WHOLE_COLS = _F["whole_rows"], _F["whole_cols"]
_FIRST, _MATRIX_STRIDE, _ROW_STRIDE = _F["first"], _F["matrix_stride"], _F["row_stride"]
_FACTORED, _SHARED_RMS, _RELATIVE, _WARMUP = _F["factored"], _F["shared_rms"], _F["relative_step"], _F["warmup_init"]
_SCALED_M, _NESTEROV, _MAXIMIZE, _DECAY = _F["scaled_momentum"], _F["nesterov"], _F["maximize"], _F["decay"]
_EPS1, _EPS2, _CLIP, _DECAY_RATE = _F["eps1"], _F["eps2"], _F["clip_threshold"], _F["decay_rate"]
_BETA1, _BETA2, _BETA2_CAP, _WEIGHT_DECAY = _F["beta1"], _F["beta2"], _F["beta2_cap"], _F["weight_decay"]
_WEIGHTS, _MOMENTUM = _F["weights_stream"], _F["momentum_stream"]
_LR_AT, _STRIP_ROWS, _STRIPS, _BLOCK_ROWS, _BLOCKS = (_F[name] for name in CUT[:5])
_CHUNKS, _PADDED, _WIDTH = (_F[name] for name in CUT[5:8])
_PARTIAL_AT, _STRIP_AT, _ROW_AT, _COL_AT, _ROOT_AT, _CHUNK_AT, _TOTAL_AT = (_F[name] for name in CUT[8:])

# Numbers per strip, and per matrix: the sum of g^2; of R, or of U^2 for a full V; of p^2. Behind them t, beta2 and
# 1 - beta2.
STRIP_SUMS = 2
TOTALS = 3
ABOUT_STEP = 3
_STRIP_SUMS = tl.constexpr(STRIP_SUMS)
_TOTALS = tl.constexpr(TOTALS)

# Phases of finalize.
COMBINE = 1
PREPARE = 2


# The table


@triton.jit
def _whole(row, field: tl.constexpr):
    return tl.load(row + field)


@triton.jit
def _real(row, field: tl.constexpr):
    return tl.load(row + field).to(tl.float64, bitcast=True)


@triton.jit
def _numbers(row, field: tl.constexpr):
    """A float32 tensor."""
    return tl.load(row + field).to(tl.pointer_type(tl.float32))


@triton.jit
def _tensor(row, field: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    """One of the parameter's shape. Without its alignment, which a cast loses, loads would be of single elements."""
    at = tl.load(row + field).to(tl.pointer_type(T))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def _rows_of(row, scratch):
    """R of this step: in scratch, or where the caller keeps it between a sweep and an apply."""
    kept = _whole(row, _NEW_R)
    at = kept.to(tl.pointer_type(tl.float32))
    if kept == 0:
        at = scratch + _whole(row, _ROW_AT)
    return at


@triton.jit
def _both(mask, flag):
    """A mask, where an integer is not 0; the interpreter does not spread single booleans."""
    return (mask.to(tl.int32) * flag) != 0


@triton.jit
def _columns(row, ALIGNED: tl.constexpr):
    m = tl.load(row + _COLS).to(tl.int32)
    if ALIGNED:
        m = tl.multiple_of(m, 16)
    return m


# The schedule: _schedule.py


@triton.jit
def _beta2(row, t):
    """(beta2_t, 1 - beta2_t)"""
    fixed = _real(row, _BETA2)
    if fixed == fixed:
        before = tl.exp2((t - 1) * tl.log2(tl.maximum(fixed, 1e-300)))
        before = tl.where(t == 1, 1.0, before)
        beta2 = fixed * (1 - before) / (1 - before * fixed)
    else:
        beta2 = 1 - tl.exp2(_real(row, _DECAY_RATE) * tl.log2(t))
        cap = _real(row, _BETA2_CAP)
        beta2 = tl.where(beta2 > cap, cap, beta2)
    return beta2.to(tl.float32), (1 - beta2).to(tl.float32)


@triton.jit
def _rho(row, t):
    """(rho_t, the group's lr)"""
    at = _whole(row, _LR_AT)
    lr = _real(row, _LR)
    if at != 0:
        lr = tl.load(at.to(tl.pointer_type(tl.float64)))
    rho = lr
    if _whole(row, _RELATIVE) != 0:
        rho = 1 / tl.sqrt(t)
        cap = tl.where(lr == lr, lr, 1e-2)
        rho = tl.where(rho < cap, rho, cap)
        if _whole(row, _WARMUP) != 0:
            rho = tl.where(1e-6 * t < rho, 1e-6 * t, rho)
    return rho, tl.where(lr == lr, lr, rho)


# Numbers in fewer bits: _rounding.py


@triton.jit
def _mix(word, key):
    word = word ^ (word >> 16)
    word = word * tl.full((), 0x7FEB352D, tl.uint32)
    word = word ^ (word >> 15)
    word = word + key
    word = word * tl.full((), 0x846CA68B, tl.uint32)
    return word ^ (word >> 16)


@triton.jit
def _key(row, field: tl.constexpr, t):
    """The two words of a stream's step."""
    words = tl.load(row + field)
    first, second = words.to(tl.uint32), (words >> 32).to(tl.uint32)
    step = t.to(tl.uint32)
    key = _mix(first ^ step, second)
    return key, _mix(second ^ step, key)


@triton.jit
def _random_bits(keys, start, offset):
    """16 of them for each element, whose index is start + offset: two neighbours share a hash.

    Only the low word of the pair's index changes from element to element, and carries into the high one once at most.
    """
    key, other = keys
    offset = offset.to(tl.uint32) + (start & 1).to(tl.uint32)
    first = start >> 1
    low, high = first.to(tl.uint32), (first >> 32).to(tl.uint32)
    pair = low + (offset >> 1)
    salt = high * tl.full((), 0x9E3779B9, tl.uint32) + key
    carried = (high + 1) * tl.full((), 0x9E3779B9, tl.uint32) + key
    word = pair ^ tl.where(pair < low, carried, salt)
    return ((_mix(word, other) >> ((offset & 1) << 4)) & 0xFFFF).to(tl.int32)


@triton.jit
def _rounded(x, T: tl.constexpr, STOCHASTIC: tl.constexpr, keys, start, offset):
    """x in T, and what that is in float32."""
    if tl.float32 == T:
        out = x
        value = x
    else:
        word = x.to(tl.int32, bitcast=True)
        size = word & 0x7FFFFFFF
        sign = word & -0x80000000
        if tl.bfloat16 == T:
            if STOCHASTIC:
                near = (size + _random_bits(keys, start, offset)) & -0x10000
                near = tl.where(near > 0x7F7F0000, 0x7F7F0000, near)
            else:
                near = (size + 0x7FFF + ((size >> 16) & 1)) & -0x10000
            near = tl.where(size < 0x7F800000, near, tl.where(size == 0x7F800000, 0x7F800000, 0x7FC00000))
            near = near | sign
            value = near.to(tl.float32, bitcast=True)
            out = (near >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            if STOCHASTIC:
                # Below its smallest normal number float16 has fewer mantissa bits; above it, the same spacing.
                small = size < 0x38800000
                lifted = size.to(tl.float32, bitcast=True) + tl.where(small, 6.103515625e-05, 0.0)
                lifted = lifted.to(tl.int32, bitcast=True)
                near = (lifted + (_random_bits(keys, start, offset) >> 3)) & -0x2000
                near = tl.where(near > 0x477FE000, 0x477FE000, near)
                near = tl.where(lifted < 0x7F800000, near, lifted)
                even = near.to(tl.float32, bitcast=True) - tl.where(small, 6.103515625e-05, 0.0)
                x = (even.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            out = x.to(tl.float16)
            value = out.to(tl.float32)
    return out, value


@triton.jit
def _float32(x):
    """By its bits from bfloat16: the interpreter's conversion loses the smallest numbers."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _load_weight(p, low, lowest, offset, mask, P: tl.constexpr, PLANES: tl.constexpr):
    weight = tl.load(p + offset, mask=mask, other=0.0)
    if PLANES == 0:
        x = _float32(weight)
    else:
        word = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
        word += tl.load(low + offset, mask=mask, other=0).to(tl.int32) << 8
        if PLANES == 2:
            word += tl.load(lowest + offset, mask=mask, other=0).to(tl.int32) & 0xFF
        x = word.to(tl.float32, bitcast=True)
    return x


@triton.jit
def _store_weight(
    x,
    p,
    low,
    lowest,
    offset,
    mask,
    P: tl.constexpr,
    PLANES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    keys,
    start,
):
    """Gives what was written, in float32."""
    if PLANES == 0:
        out, value = _rounded(x, P, STOCHASTIC, keys, start, offset)
        tl.store(p + offset, out, mask=mask)
    else:
        word = x.to(tl.int32, bitcast=True)
        size = word & 0x7FFFFFFF
        sign = word & -0x80000000
        if PLANES == 1:
            near = (size + 0x80) & -0x100
            near = tl.where(near > 0x7F7FFF00, 0x7F7FFF00, near)
            size = tl.where(size < 0x7F800000, near, size)
        word = tl.where(size > 0x7F800000, 0x7FC00000, size) | sign
        top = (word + 0x8000) >> 16
        rest = word - (top << 16)
        tl.store(p + offset, top.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(low + offset, (rest >> 8).to(tl.int8), mask=mask)
        if PLANES == 2:
            tl.store(lowest + offset, rest.to(tl.int8), mask=mask)
        value = word.to(tl.float32, bitcast=True)
    return value


@triton.jit
def _per_element(of_group, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """One number per group of columns, for each of its elements.  # [ROWS, groups] -> [ROWS, WIDE]"""
    GROUPS: tl.constexpr = of_group.shape[1]
    return tl.reshape(tl.broadcast_to(of_group[:, :, None], (ROWS, GROUPS, WIDE // GROUPS)), (ROWS, WIDE))


@triton.jit
def _quantize(
    M, here, ROWS: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, STOCHASTIC: tl.constexpr, keys, start, offset
):
    """Codes, and a scale per group of columns."""
    word = M.to(tl.int32, bitcast=True)
    size = tl.where(here, word & 0x7FFFFFFF, 0)
    most = tl.max(tl.reshape(size, (ROWS, GROUPS, WIDE // GROUPS)), 2)
    largest = most.to(tl.float32, bitcast=True)
    empty = largest < 7.888609052210118e-31  # 2^-100
    finite = most < 0x7F800000
    scale = tl.where(finite, tl.where(empty, 0.0, largest * 6.200012400024800e-05), float("inf"))  # 1 / 127^2
    good = finite & (largest >= 7.888609052210118e-31)
    inverse = tl.where(good, tl.div_rn(1.0, tl.where(good, scale, 1.0)), 0.0)
    square = size.to(tl.float32, bitcast=True) * _per_element(inverse, ROWS, WIDE)
    square = tl.where(square < 16129.0, square, 16129.0)
    square = tl.where(_per_element(good.to(tl.int32), ROWS, WIDE) != 0, square, 0.0)
    code = tl.floor(tl.sqrt_rn(square))
    draw = 0.5
    if STOCHASTIC:
        draw = (_random_bits(keys, start, offset).to(tl.float32) + 0.5) * 1.52587890625e-05
    code += ((square - code * code) > draw * (2 * code + 1)).to(tl.float32)
    return tl.where(word < 0, -code, code).to(tl.int8), scale


# Sweep

# Offsets within a tile are of 32 bits, and those of a tile of 64.


@triton.jit
def _sweep_rows(g, old_R, new_R, partial, sums, count, m, padded, average, TILE: tl.constexpr, BC: tl.constexpr):
    """`count` rows that fit into a tile: each is read once."""
    RB: tl.constexpr = TILE // BC
    beta2, rest, eps1, whole = average
    rows, cols = tl.arange(0, RB), tl.arange(0, BC)
    in_row = (cols < m)[None, :]
    offset = rows[:, None] * m + cols[None, :]
    col_sq = tl.zeros((RB, BC), tl.float32)
    col_ratio = tl.zeros((RB, BC), tl.float32)
    grad_sq = tl.zeros((RB,), tl.float32)
    row_sum = tl.zeros((RB,), tl.float32)
    ahead = tl.load(g + offset, mask=(rows < count)[:, None] & in_row, other=0.0)
    for i in range(0, count, RB):
        here = rows + i < count
        G2 = _float32(ahead)
        G2 = G2 * G2
        g += RB * m
        ahead = tl.load(g + offset, mask=(rows + RB + i < count)[:, None] & in_row, other=0.0)
        row_sq = tl.sum(G2, 1)
        R = tl.load(old_R + i + rows, mask=here, other=0.0) * beta2 + rest * (tl.div_rn(row_sq, whole) + eps1)
        tl.store(new_R + i + rows, R, mask=here)
        grad_sq += row_sq
        row_sum += tl.where(here, R, 0.0)
        col_sq += G2
        col_ratio += G2 * tl.where(here, tl.div_rn(1.0, tl.where(here, R, 1.0)), 0.0)[:, None]
    tl.store(sums, tl.sum(grad_sq, 0))
    tl.store(sums + 1, tl.sum(row_sum, 0))
    tl.store(partial + cols, tl.sum(col_sq, 0), mask=cols < m)
    tl.store(partial + padded + cols, tl.sum(col_ratio, 0), mask=cols < m)


@triton.jit
def _sweep_wide(g, old_R, new_R, partial, sums, count, m, padded, average, TILE: tl.constexpr):
    """Rows that do not: a few at a time are read twice, the second time from the cache, and columns added in place."""
    RB: tl.constexpr = TILE // _PANEL
    beta2, rest, eps1, whole = average
    rows, cols = tl.arange(0, RB), tl.arange(0, _PANEL)
    offset = rows[:, None] * m + cols[None, :]
    grad_sq = tl.zeros((RB,), tl.float32)
    row_sum = tl.zeros((RB,), tl.float32)
    for i in range(0, count, RB):
        here = rows + i < count
        sq = tl.zeros((RB, _PANEL), tl.float32)
        for j in range(0, m, _PANEL):
            x = _float32(tl.load(g + j + offset, mask=here[:, None] & (cols + j < m)[None, :], other=0.0))
            sq += x * x
        row_sq = tl.sum(sq, 1)
        R = tl.load(old_R + i + rows, mask=here, other=0.0) * beta2 + rest * (tl.div_rn(row_sq, whole) + eps1)
        tl.store(new_R + i + rows, R, mask=here)
        grad_sq += row_sq
        row_sum += tl.where(here, R, 0.0)
        inverse = tl.where(here, tl.div_rn(1.0, tl.where(here, R, 1.0)), 0.0)[:, None]
        for j in range(0, m, _PANEL):
            in_row = cols + j < m
            x = _float32(tl.load(g + j + offset, mask=here[:, None] & in_row[None, :], other=0.0))
            G2 = x * x
            place = partial + j + cols
            old = _both(in_row, i)
            tl.store(place, tl.load(place, mask=old, other=0.0) + tl.sum(G2, 0), mask=in_row)
            place += padded
            tl.store(place, tl.load(place, mask=old, other=0.0) + tl.sum(G2 * inverse, 0), mask=in_row)
        g += RB * m
        tl.debug_barrier()  # the next rows read what other threads may have written
    tl.store(sums, tl.sum(grad_sq, 0))
    tl.store(sums + 1, tl.sum(row_sum, 0))


@triton.jit
def _moved(V, g, beta2, rest, eps1):
    """V <- beta2 V + (1 - beta2) (g^2 + eps1)"""
    return V * beta2 + rest * (g * g + eps1)


@triton.jit
def _sweep_full(g, V, sums, count, average):
    """The sums of g^2 and U^2 of `count` elements."""
    beta2, rest, eps1, _ = average
    cols = tl.arange(0, _PANEL)
    grad_sq = tl.zeros((_PANEL,), tl.float32)
    update_sq = tl.zeros((_PANEL,), tl.float32)
    whole = count // _PANEL * _PANEL
    for j in range(0, whole, _PANEL):
        x = _float32(tl.load(g + j + cols))
        grad_sq += x * x
        update_sq += tl.div_rn(x * x, _moved(tl.load(V + j + cols), x, beta2, rest, eps1))
    if whole < count:
        here = cols + whole < count
        x = _float32(tl.load(g + whole + cols, mask=here, other=0.0))
        moved = _moved(tl.load(V + whole + cols, mask=here, other=1.0), x, beta2, rest, eps1)
        grad_sq += x * x
        update_sq += tl.div_rn(x * x, tl.where(here, moved, 1.0))
    tl.store(sums, tl.sum(grad_sq, 0))
    tl.store(sums + 1, tl.sum(update_sq, 0))


@triton.jit
def sweep(table, items, scratch, G: tl.constexpr, ALIGNED: tl.constexpr):
    """R of this step into scratch; per column the sums of g^2 and of g^2 / R; the sums of g^2 and R, or g^2 and U^2."""
    item = tl.load(items + tl.program_id(0))
    row = table + (item >> 32) * _W
    strip = item & 0xFFFFFFFF
    beta2, rest = _beta2(row, tl.load(_numbers(row, _STEP)).to(tl.float64) + 1)
    average = beta2, rest, _real(row, _EPS1).to(tl.float32), _whole(row, _WHOLE_COLS).to(tl.float32)
    g = _tensor(row, _G, G, ALIGNED)
    sums = scratch + _whole(row, _STRIP_AT) + strip * _STRIP_SUMS
    if _whole(row, _FACTORED) == 0:
        begin = strip * _FULL
        count = tl.minimum(_FULL, _whole(row, _COLS) - begin).to(tl.int32)
        _sweep_full(g + begin, _tensor(row, _R, tl.float32, ALIGNED) + begin, sums, count, average)
    else:
        m, n, strips = _columns(row, ALIGNED), _whole(row, _ROWS), _whole(row, _STRIPS)
        matrix = strip // strips
        height = _whole(row, _STRIP_ROWS)
        begin = strip % strips * height
        count = tl.minimum(height, n - begin).to(tl.int32)
        at = matrix * n + begin
        g += at * m
        old_R = _numbers(row, _R) + at
        new_R = _rows_of(row, scratch) + at
        padded = _whole(row, _PADDED)
        partial = scratch + _whole(row, _PARTIAL_AT) + strip * 2 * padded
        TILE: tl.constexpr = _TILE // (1 if ALIGNED and tl.float32 != G else 2)  # as registers allow
        width = _whole(row, _WIDTH)
        if width == 64:
            _sweep_rows(g, old_R, new_R, partial, sums, count, m, padded, average, TILE, 64)
        elif width == 256:
            _sweep_rows(g, old_R, new_R, partial, sums, count, m, padded, average, TILE, 256)
        elif width == 1024:
            _sweep_rows(g, old_R, new_R, partial, sums, count, m, padded, average, TILE, 1024)
        elif width == 2048:
            _sweep_rows(g, old_R, new_R, partial, sums, count, m, padded, average, TILE, 2048)
        elif width == 4096:
            _sweep_rows(g, old_R, new_R, partial, sums, count, m, padded, average, TILE, 4096)
        elif (width == 8192) & (TILE == 8192):
            _sweep_rows(g, old_R, new_R, partial, sums, count, m, padded, average, TILE, TILE)
        else:
            _sweep_wide(g, old_R, new_R, partial, sums, count, m, padded, average, TILE)


# Finalize


@triton.jit
def _sum_of(at, count, stride):
    """`count` numbers, `stride` apart."""
    lanes = tl.arange(0, 256)
    total = tl.zeros((256,), tl.float32)
    for i in range(0, count, 256):
        total += tl.load(at + (lanes + i) * stride, mask=lanes + i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _column_sums(partial, strips, padded, cols, here):
    """Over all strips of a matrix, in an order of its own."""
    SB: tl.constexpr = 32
    some = tl.arange(0, SB)
    sums = tl.zeros((SB, _CHUNK), tl.float32)
    for s in range(0, strips, SB):
        mask = (some + s < strips)[:, None] & here[None, :]
        sums += tl.load(partial + (some + s)[:, None] * 2 * padded + cols[None, :], mask=mask, other=0.0)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["phases"])
def finalize(table, items, scratch, phases):
    """C and 1 / sqrt(C) of a chunk of columns, and what it adds to mean(U^2); the sums of a matrix, by its first chunk.

    Where sums cross a mesh, COMBINE and PREPARE are launched apart, and between them the sums are the plan's.
    """
    item = tl.load(items + tl.program_id(0))
    row = table + (item >> 32) * _W
    index = item & 0xFFFFFFFF
    chunks, strips, matrices = _whole(row, _CHUNKS), _whole(row, _STRIPS), _whole(row, _MATRICES)
    matrix, chunk = index // chunks, index % chunks
    factored, scaled = _whole(row, _FACTORED) != 0, _whole(row, _PARAM_SQ) != 0
    n, m = _whole(row, _WHOLE_ROWS).to(tl.float32), _whole(row, _COLS)
    cols = chunk * _CHUNK + tl.arange(0, _CHUNK)
    here = cols < m
    col_sq = tl.zeros((_CHUNK,), tl.float32)
    col_ratio = tl.zeros((_CHUNK,), tl.float32)
    total = scratch + _whole(row, _TOTAL_AT) + matrix * _TOTALS
    sums = _numbers(row, _SUMS) + matrix
    col_sums = _numbers(row, _SUMS) + (2 + scaled.to(tl.int64)) * matrices + matrix * m + cols
    first = chunk == 0

    if phases & 1:
        strip = scratch + _whole(row, _STRIP_AT) + matrix * strips * _STRIP_SUMS
        grad_sq, second = _sum_of(strip, strips, _STRIP_SUMS), _sum_of(strip + 1, strips, _STRIP_SUMS)
        param_sq = grad_sq * 0
        if scaled & first:
            blocks = _whole(row, _BLOCKS)
            param_sq = _sum_of(_numbers(row, _PARAM_SQ) + matrix * blocks, blocks, 1)
        if factored:
            padded = _whole(row, _PADDED)
            partial = scratch + _whole(row, _PARTIAL_AT) + matrix * strips * 2 * padded
            col_sq = _column_sums(partial, strips, padded, cols, here)
            col_ratio = _column_sums(partial + padded, strips, padded, cols, here)
        if phases & 2 == 0:
            if first:
                tl.store(sums, grad_sq)
                tl.store(sums + matrices, second)
                if scaled:
                    tl.store(sums + 2 * matrices, param_sq)
            if factored:
                tl.store(col_sums, col_sq, mask=here)
                tl.store(col_sums + matrices * m, col_ratio, mask=here)
    else:
        grad_sq, second = tl.load(sums), tl.load(sums + matrices)
        param_sq = grad_sq * 0
        if scaled:
            param_sq = tl.load(sums + 2 * matrices)
        if factored:
            col_sq = tl.load(col_sums, mask=here, other=0.0)
            col_ratio = tl.load(col_sums + matrices * m, mask=here, other=0.0)

    if phases & 2:
        t = tl.load(_numbers(row, _STEP)).to(tl.float64) + 1
        mean_U2 = tl.div_rn(second, _whole(row, _WHOLE_COLS).to(tl.float32))
        if factored:
            beta2, rest = _beta2(row, t)
            at = matrix * m + cols
            C = tl.load(_numbers(row, _C) + at, mask=here, other=0.0)
            C = C * beta2 + rest * (tl.div_rn(col_sq, n) + _real(row, _EPS1).to(tl.float32))
            b = tl.div_rn(1.0, tl.sqrt_rn(tl.where(here, C, 1.0)))
            tl.store(scratch + _whole(row, _COL_AT) + at, C, mask=here)
            tl.store(scratch + _whole(row, _ROOT_AT) + at, b, mask=here)
            U = tl.sqrt_rn(tl.div_rn(col_ratio, n)) * (tl.sqrt_rn(tl.div_rn(second, n)) * b)
            mean_U2 = tl.div_rn(tl.sum(tl.where(here, U * U, 0.0), 0), _whole(row, _WHOLE_COLS).to(tl.float32))
        tl.store(scratch + _whole(row, _CHUNK_AT) + index, mean_U2)
        if first:
            tl.store(total, grad_sq)
            tl.store(total + 1, second)
            tl.store(total + 2, param_sq)
            if matrix == 0:
                beta2, rest = _beta2(row, t)
                about_step = scratch + _whole(row, _TOTAL_AT) + matrices * _TOTALS
                tl.store(about_step, t.to(tl.float32))
                tl.store(about_step + 1, beta2)
                tl.store(about_step + 2, rest)


# Apply


@triton.jit
def _finite(x):
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def _clip(row, rms_U):
    threshold = _real(row, _CLIP)
    return tl.where(rms_U > threshold, rms_U / threshold, 1.0)  # None is NaN: never


@triton.jit
def _settle(row, scratch, t, matrix):
    """RMS(U) and the step size of one matrix; for the parameter, whether the step is taken and the share clipped.

    Sums that overflow, and weights that are not finite already, stop the step as a bad gradient does.
    """
    MB: tl.constexpr = 8
    CB: tl.constexpr = 32
    matrices, chunks = _whole(row, _MATRICES), _whole(row, _CHUNKS)
    scaled, shared = _whole(row, _PARAM_SQ) != 0, _whole(row, _SHARED_RMS) != 0
    count = (_whole(row, _WHOLE_ROWS) * _whole(row, _WHOLE_COLS)).to(tl.float64)
    rho, lr = _rho(row, t)
    some, part = tl.arange(0, MB), tl.arange(0, CB)
    own_U2, own_p2, all_U2, all_p2 = t * 0, t * 0, t * 0, t * 0
    clipped, bad = t * 0, tl.full((), 0, tl.int32)
    for k in range(0, matrices, MB):
        here = some + k < matrices
        sums = tl.zeros((MB, CB), tl.float32)
        for c in range(0, chunks, CB):
            mask = here[:, None] & (part + c < chunks)[None, :]
            at = (some + k)[:, None] * chunks + (part + c)[None, :]
            sums += tl.load(scratch + _whole(row, _CHUNK_AT) + at, mask=mask, other=0.0)
        mean_U2 = tl.sum(sums, 1).to(tl.float64)
        total = scratch + _whole(row, _TOTAL_AT) + (some + k) * _TOTALS
        grad_sq = tl.load(total, mask=here, other=0.0)
        mean_p2 = tl.load(total + 2, mask=here, other=0.0).to(tl.float64) / count
        rms_U = tl.sqrt(mean_U2)
        alpha = (rho * tl.sqrt(mean_p2)).to(tl.float32)
        fine = _finite(grad_sq) & _finite(rms_U.to(tl.float32)) & _finite(alpha)
        bad += tl.sum((here & (fine == 0)).to(tl.int32), 0)
        clipped += tl.sum((here & (_clip(row, rms_U) > 1)).to(tl.float64), 0)
        own = some + k == matrix
        own_U2 += tl.sum(tl.where(own, mean_U2, 0.0), 0)
        own_p2 += tl.sum(tl.where(own, mean_p2, 0.0), 0)
        all_U2 += tl.sum(mean_U2, 0)
        all_p2 += tl.sum(mean_p2, 0)
    number = matrices.to(tl.float64)
    rms_U = tl.sqrt(tl.where(shared, all_U2 / number, own_U2))
    rms_p = tl.sqrt(tl.where(shared, all_p2 / number, own_p2))
    clip = _clip(row, rms_U)
    clipped = tl.where(shared, (clip > 1).to(tl.float64), clipped / number)
    eps2 = _real(row, _EPS2)
    alpha = tl.where(scaled, rho * tl.where(rms_p > eps2, rms_p, eps2), rho)
    ok = ((bad == 0) & _finite(alpha.to(tl.float32))).to(tl.int32)
    mode = _whole(row, _DECAY)
    decay = tl.where(mode == 0, lr, tl.where(mode == 1, alpha, tl.where(mode == 2, 1.0, rho * rho)))
    shrink = (_real(row, _WEIGHT_DECAY) * decay).to(tl.float32)
    return ok, rho, rms_U, alpha, clip, clipped, shrink


@triton.jit
def _descend(
    tensors,
    at,
    offset,
    start,
    here,
    U,
    factors,
    decided,
    groups_at,
    in_group,
    P: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Momentum and decay of a tile whose U is scaled already; p and its momentum are committed. Gives p as it is now.

    p receives M as computed. What is kept of it is rounded as weights are.
    """
    p, low, lowest, m, m_scale = tensors
    p, low, lowest, m = p + at, low + at, lowest + at, m + at
    _, after, shrink, beta1, rest1, nesterov = factors
    ok, moves, keys = decided
    weight_keys, momentum_keys = keys
    weight = _load_weight(p, low, lowest, offset, here, P, PLANES)
    step = U
    if M is not None:
        GROUPS: tl.constexpr = (WIDE + _GROUP - 1) // _GROUP
        kept = tl.load(m + offset, mask=here, other=0.0 if tl.int8 != M else 0)
        if tl.int8 == M:
            code = kept.to(tl.float32)
            scale = tl.load(m_scale + groups_at, mask=in_group, other=0.0)
            old = (code * tl.abs(code)) * _per_element(scale, ROWS, WIDE)
        else:
            old = _float32(kept)
        fresh = old * beta1 + U * rest1
        if tl.int8 == M:
            codes, scale = _quantize(fresh, here, ROWS, WIDE, GROUPS, STOCHASTIC, momentum_keys, start, offset)
            tl.store(m + offset, codes, mask=_both(here, ok))
            tl.store(m_scale + groups_at, scale, mask=_both(in_group, ok))
        else:
            out, _ = _rounded(fresh, M, STOCHASTIC, momentum_keys, start, offset)
            tl.store(m + offset, out, mask=_both(here, ok))
        step = tl.where(nesterov, fresh * beta1 + U * rest1, fresh) * after
    step = tl.where(shrink != 0, step + weight * shrink, step)
    written = _store_weight(
        weight - step, p, low, lowest, offset, _both(here, moves), P, PLANES, STOCHASTIC, weight_keys, start
    )
    return tl.where(here, tl.where(moves != 0, written, weight), 0.0)


@triton.jit
def _apply_rows(
    row,
    new_R,
    b,
    g,
    tensors,
    at,
    start,
    count,
    m,
    root_mean,
    factors,
    decided,
    P: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
    BC: tl.constexpr,
):
    """`count` rows, the first of which is row `at` of all and element `start` of the whole. Gives the sum of p^2."""
    RB: tl.constexpr = TILE // BC
    GROUPS: tl.constexpr = (BC + _GROUP - 1) // _GROUP
    scale, ok = factors[0], decided[0]
    rows, cols, groups = tl.arange(0, RB), tl.arange(0, BC), tl.arange(0, GROUPS)
    each = (m + _GROUP - 1) // _GROUP
    offset = rows[:, None] * m + cols[None, :]
    beside = rows[:, None] * 0 + cols[None, :]  # in the layout of a tile: no exchange between threads
    param_sq = tl.zeros((RB, BC), tl.float32)
    for i in range(0, count, RB):
        in_strip = rows + i < count
        R = tl.load(new_R + at + i + rows, mask=_both(in_strip, ok), other=1.0)
        a = (tl.div_rn(root_mean, tl.sqrt_rn(R)) * scale)[:, None]
        tl.store(_numbers(row, _R) + at + i + rows, R, mask=_both(in_strip, ok))
        for j in range(0, m, BC):
            here = in_strip[:, None] & (cols + j < m)[None, :]
            from_first = i * m + j
            U = _float32(tl.load(g + at * m + from_first + offset, mask=here, other=0.0))
            U = U * tl.load(b + j + beside, mask=here, other=0.0) * a
            group = groups + j // _GROUP
            groups_at = (rows + at + i)[:, None] * each + group[None, :]
            in_group = in_strip[:, None] & (group < each)[None, :]
            written = _descend(
                tensors, at * m + from_first, offset, start + from_first, here, U, factors, decided,
                groups_at, in_group, P, M, PLANES, STOCHASTIC, RB, BC,
            )  # fmt: skip
            param_sq += written * written
    return tl.sum(tl.sum(param_sq, 1), 0)


@triton.jit
def _apply_matrix(
    row,
    scratch,
    g,
    tensors,
    matrix,
    begin,
    height,
    m,
    factors,
    decided,
    P: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    n = _whole(row, _ROWS)
    count = tl.minimum(height, n - begin).to(tl.int32)
    at = matrix * n + begin
    start = _whole(row, _FIRST) + matrix * _whole(row, _MATRIX_STRIDE) + begin * _whole(row, _ROW_STRIDE)
    new_R = _rows_of(row, scratch)
    b = scratch + _whole(row, _ROOT_AT) + matrix * m
    if ALIGNED:
        b = tl.multiple_of(b, 16)
    row_sum = tl.load(scratch + _whole(row, _TOTAL_AT) + matrix * _TOTALS + 1)
    root_mean = tl.sqrt_rn(tl.div_rn(row_sum, _whole(row, _WHOLE_ROWS).to(tl.float32)))
    # As registers allow; the same for split weights and float32 ones, whose sums of p^2 are to have one order.
    TILE: tl.constexpr = _PANEL if M is None and PLANES == 0 and tl.float32 != P and ALIGNED else _PANEL // 2
    width = _whole(row, _WIDTH)
    if width == 64:
        param_sq = _apply_rows(
            row,
            new_R,
            b,
            g,
            tensors,
            at,
            start,
            count,
            m,
            root_mean,
            factors,
            decided,
            P,
            M,
            PLANES,
            STOCHASTIC,
            TILE,
            64,
        )
    elif width == 256:
        param_sq = _apply_rows(
            row,
            new_R,
            b,
            g,
            tensors,
            at,
            start,
            count,
            m,
            root_mean,
            factors,
            decided,
            P,
            M,
            PLANES,
            STOCHASTIC,
            TILE,
            256,
        )
    elif width == 1024:
        param_sq = _apply_rows(
            row,
            new_R,
            b,
            g,
            tensors,
            at,
            start,
            count,
            m,
            root_mean,
            factors,
            decided,
            P,
            M,
            PLANES,
            STOCHASTIC,
            TILE,
            1024,
        )
    else:
        param_sq = _apply_rows(
            row,
            new_R,
            b,
            g,
            tensors,
            at,
            start,
            count,
            m,
            root_mean,
            factors,
            decided,
            P,
            M,
            PLANES,
            STOCHASTIC,
            TILE,
            TILE,
        )
    return param_sq


@triton.jit
def _full_tile(
    g,
    V_at,
    tensors,
    at,
    start,
    cols,
    here,
    moment,
    factors,
    decided,
    P: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDE: tl.constexpr,
):
    beta2, rest, eps1 = moment
    x = _float32(tl.load(g + at + cols, mask=here, other=0.0))
    V = _moved(tl.load(V_at + at + cols, mask=here, other=1.0), x, beta2, rest, eps1)
    U = x * tl.div_rn(1.0, tl.sqrt_rn(tl.where(here, V, 1.0))) * factors[0]
    tl.store(V_at + at + cols, V, mask=_both(here, decided[0]))
    return _descend(tensors, at, cols, start, here, U, factors, decided, cols, here, P, M, PLANES, STOCHASTIC, 1, WIDE)


@triton.jit
def _apply_full(
    row,
    g,
    V_at,
    tensors,
    begin,
    count,
    moment,
    factors,
    decided,
    P: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The same for `count` elements of a full V."""
    WIDE: tl.constexpr = _PANEL // 2
    cols = tl.arange(0, WIDE)
    first = _whole(row, _FIRST) + begin
    param_sq = tl.zeros((WIDE,), tl.float32)
    whole = count // WIDE * WIDE
    for j in range(0, whole, WIDE):
        written = _full_tile(
            g, V_at, tensors, begin + j, first + j, cols, cols >= 0, moment, factors, decided,
            P, M, PLANES, STOCHASTIC, WIDE,
        )  # fmt: skip
        param_sq += written * written
    if whole < count:
        written = _full_tile(
            g, V_at, tensors, begin + whole, first + whole, cols, cols + whole < count, moment, factors, decided,
            P, M, PLANES, STOCHASTIC, WIDE,
        )  # fmt: skip
        param_sq += written * written
    return tl.sum(param_sq, 0)


@triton.jit(do_not_specialize=["measure"])
def apply(
    table,
    items,
    scratch,
    measure,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """U, momentum and decay of a block of rows, committed where ok; and the sum of p^2, for the next step's RMS(p).

    With `measure` there is no step: nothing but that sum is written.
    """
    item = tl.load(items + tl.program_id(0))
    row = table + (item >> 32) * _W
    index = item & 0xFFFFFFFF
    blocks, height = _whole(row, _BLOCKS), _whole(row, _BLOCK_ROWS)
    matrix, block = index // blocks, index % blocks
    matrices, m = _whole(row, _MATRICES), _columns(row, ALIGNED)
    total = scratch + _whole(row, _TOTAL_AT)
    about_step = total + matrices * _TOTALS
    t = tl.load(about_step).to(tl.float64)
    ok, rho, rms_U, alpha, clip, clipped, shrink = _settle(row, scratch, t, matrix)
    ok = ok & (measure == 0).to(tl.int32)
    moves = ok & (rho != 0).to(tl.int32)

    averages_U = False
    if M is not None:
        averages_U = _whole(row, _SCALED_M) == 0
    scale = tl.where(_whole(row, _MAXIMIZE) != 0, -1.0, 1.0) / clip
    scale = (scale * tl.where(averages_U, 1.0, alpha)).to(tl.float32)
    after = tl.where(averages_U, alpha, 1.0).to(tl.float32)
    beta1 = _real(row, _BETA1)
    keys = _key(row, _WEIGHTS, t), _key(row, _MOMENTUM, t)

    g, p = _tensor(row, _G, G, ALIGNED), _tensor(row, _P, P, ALIGNED)
    low, lowest = _tensor(row, _LOW, tl.int8, ALIGNED), _tensor(row, _LOWEST, tl.int8, ALIGNED)
    average = p
    if M is not None:
        average = _tensor(row, _M, M, ALIGNED)
    tensors = p, low, lowest, average, _numbers(row, _M_SCALE)
    factors = scale, after, shrink, beta1.to(tl.float32), (1 - beta1).to(tl.float32), _whole(row, _NESTEROV) != 0
    decided = ok, moves, keys
    begin = block * height
    if tl.int8 == M:  # one-byte momentum is of matrices
        param_sq = _apply_matrix(
            row, scratch, g, tensors, matrix, begin, height, m, factors, decided, P, M, PLANES, STOCHASTIC, ALIGNED
        )
    else:
        if _whole(row, _FACTORED) == 0:
            moment = tl.load(about_step + 1), tl.load(about_step + 2), _real(row, _EPS1).to(tl.float32)
            first = block * _FULL
            count = tl.minimum(_FULL, _whole(row, _COLS) - first).to(tl.int32)
            V = _tensor(row, _R, tl.float32, ALIGNED)
            param_sq = _apply_full(row, g, V, tensors, first, count, moment, factors, decided, P, M, PLANES, STOCHASTIC)
        else:
            param_sq = _apply_matrix(
                row, scratch, g, tensors, matrix, begin, height, m, factors, decided, P, M, PLANES, STOCHASTIC, ALIGNED
            )
    # What belongs to the matrix as a whole is shared out among its blocks.
    if _whole(row, _FACTORED) != 0:
        each = (m + blocks - 1) // blocks
        lanes = tl.arange(0, 256)
        for j in range(block * each, tl.minimum((block + 1) * each, m), 256):
            here = lanes + j < tl.minimum((block + 1) * each, m)
            C = tl.load(scratch + _whole(row, _COL_AT) + matrix * m + j + lanes, mask=here, other=0.0)
            tl.store(_numbers(row, _C) + matrix * m + j + lanes, C, mask=_both(here, ok))
    if _whole(row, _PARAM_SQ) != 0:
        tl.store(_numbers(row, _PARAM_SQ) + index, param_sq)
    if (block == 0) & (measure == 0):
        report = _numbers(row, _REPORT)
        if ok != 0:
            tl.store(report + 3 + matrix, rms_U.to(tl.float32))
            tl.store(report + 3 + matrices + matrix, alpha.to(tl.float32))
        if matrix == 0:
            if ok != 0:
                step = _numbers(row, _STEP)
                tl.store(step, tl.load(step) + 1)
                tl.store(report, tl.load(report) + 1)
                tl.store(report + 1, tl.load(report + 1) + clipped.to(tl.float32))
            else:
                tl.store(report + 2, tl.load(report + 2) + 1)
