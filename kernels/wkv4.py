"""RWKV-4's WKV in Triton: a state (aa, bb, pp) per channel goes through T steps, and its gradient back.

    forward   q = max(pp, u + k);  y = (e^{pp−q} aa + e^{u+k−q} v) / (e^{pp−q} bb + e^{u+k−q})
              q = max(pp + w, k);  f = e^{pp+w−q};  e = e^{k−q};  aa' = f aa + e v;  bb' = f bb + e;  pp' = q
    backward  D the denominator of y;  s = gy e^{u+k−q}/D;  z = gy e^{pp−q}/D;  x = s(v − y)
              gv = s + e ga;  gk = x + e(ga v + gb) [+ r if k > pp + w];  gu += x
              gw += f(ga aa + gb bb) [+ r if not];  ga, gb = z + f ga, f gb − z y;  r goes on if not k > pp + w

A program owns BLOCK channels of one sequence through one segment of `steps` time steps:

  kernel        reads                                         writes
  _forward      its state before the segment; k, v once       y, the state every 32 steps, the last segment's last state
                (y_ptr None: nothing; k, v)                   (what the segment makes of an empty state)
  _scan         what the segments make of an empty state      the state before each segment
  _grad_local   k, v, gy; the saved state before the segment  (ga, gb) that the segment's own y send to its start, the
                                                              factor on those from after it, whether r passes
  _grad_scan    what _grad_local wrote; grad_state            (ga, gb, r) after each segment
  _backward     k, v twice (the second time from a cache),    gk, gv, its sums of gw and gu, the first segment's
                gy; saved states; (ga, gb, r) after it        gradient of the initial state
  _total        all sums of gw and gu                         gw, gu

`schedule` makes one segment of all T where sequences and channels alone fill a GPU; else segments run side by side and
_scan joins them, for 5/3 of the traffic. Of each pair of exponentials one is e⁰, so a step takes two. _backward goes
through 32 steps in groups of STEPS: first over all, leaving the state before each group in scratch memory that no
other program sees, then for each group, last to first, forward with all its states in registers, and back.
"""
import math

import triton
import triton.language as tl

from .target import INTERPRETED, lanes

SAVED = 32  # steps from one saved state to the next
EMPTY = tl.constexpr(-1e38)  # pp of a state that has seen nothing, as the caller sees it; inside it is LOWEST
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32
ABSENT = tl.constexpr(float("-inf"))  # k of a step past the end
LOG2E = tl.constexpr(1.4426950408889634)


# ---- one step: [BLOCK] each ------------------------------------------------------------------------------------------

@triton.jit
def _factors(a, b):
    """-> e^{a − max(a, b)}, e^{b − max(a, b)}"""
    d = a - b
    small = tl.exp2(tl.abs(d) * -LOG2E)
    return tl.where(d < 0, small, 1.0), tl.where(d < 0, 1.0, small)


@triton.jit
def _finite(exponent):
    """One that overflowed downwards, or was -inf, is the lowest number: no difference is of two infinities then, and
    the empty state is no larger than anything. NaN stays NaN."""
    return tl.where(exponent < LOWEST, LOWEST, exponent)


@triton.jit
def _advance(aa, bb, pp, k, v, w):
    """-> the state after the step, f, e"""
    before = _finite(pp + w)
    f, e = _factors(before, k)
    return f * aa + e * v, f * bb + e, tl.maximum(before, k), f, e


@triton.jit
def _mean(aa, bb, pp, k, v, u):
    """-> y, e^{pp−q}/D, e^{u+k−q}/D"""
    past, present = _factors(pp, _finite(u + k))
    inverse = 1 / (past * bb + present)
    return (past * aa + present * v) * inverse, past * inverse, present * inverse


# ---- places, loads and stores; all tensors are contiguous ------------------------------------------------------------

@triton.jit
def _place(first, B, T, C, steps, BLOCK: tl.constexpr):
    """-> (segment, sequence, its first step, the step after its last, channels)"""
    blocks = tl.cdiv(C, BLOCK)
    program = tl.program_id(0)
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    segment = first + program // blocks // B
    start = segment * steps
    return segment, (program // blocks % B).to(tl.int64), start, tl.minimum(start + steps, T), c


@triton.jit
def _load(ptrs, inside, valid, other):
    if inside is None and valid is None:
        return tl.load(ptrs)
    elif inside is None:
        return tl.load(ptrs, mask=valid, other=other)
    else:
        return tl.load(ptrs, mask=inside if valid is None else inside & valid, other=other)


@triton.jit
def _load_steps(ptrs, t, stop, C, inside, FULL: tl.constexpr, STEPS: tl.constexpr):
    """-> a tuple of the rows of steps t to t + STEPS − 1, of which the first is at ptrs"""
    rows = ()
    for i in tl.static_range(STEPS):
        rows = rows + (_load(ptrs + i * C, inside, None if FULL else t + i < stop, 0),)
    return rows


@triton.jit
def _step(k, v, w, valid, ACC: tl.constexpr):
    """-> k, v, w in Acc; of a step that is not valid, what leaves any state as it is"""
    k, v = k.to(ACC), v.to(ACC)
    if valid is None:
        return k, v, w
    else:
        return tl.where(valid, k, ABSENT), v, tl.where(valid, w, 0.0)


@triton.jit
def _store(ptrs, value, inside, valid):
    value = value.to(ptrs.dtype.element_ty)
    if inside is None and valid is None:
        tl.store(ptrs, value)
    elif inside is None:
        tl.store(ptrs, value, mask=valid)
    else:
        tl.store(ptrs, value, mask=inside if valid is None else inside & valid)


@triton.jit
def _three(ptr, row, C, c, inside):
    """Rows 3 row to 3 row + 2 of a matrix with C columns"""
    ptrs = ptr + row * (3 * C) + c
    return _load(ptrs, inside, None, 0), _load(ptrs + C, inside, None, 0), _load(ptrs + 2 * C, inside, None, 0)


@triton.jit
def _store_three(ptr, row, C, c, inside, x0, x1, x2):
    ptrs = ptr + row * (3 * C) + c
    _store(ptrs, x0, inside, None)
    _store(ptrs + C, x1, inside, None)
    _store(ptrs + 2 * C, x2, inside, None)


@triton.jit
def _state(ptr, row, C, c, inside, w):
    """The row-th state: an empty one where bb is 0, or without a pointer; in the dtype of w"""
    if ptr is None:
        zero = tl.zeros_like(w)
        return zero, zero, zero + LOWEST
    else:
        aa, bb, pp = _three(ptr, row, C, c, inside)
        return aa, bb, tl.where(bb == 0, LOWEST, pp)


# ---- forward ---------------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["B", "T", "steps"])
def _forward(
        w_ptr, u_ptr, k_ptr, v_ptr, state_ptr, y_ptr, final_ptr, checkpoints_ptr, B, T, C, steps, FULL: tl.constexpr,
        EVEN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SAVED: tl.constexpr):
    """state_ptr: the state before each segment: [segments, B, 3, C], or None. final_ptr: [B, 3, C]; without y_ptr
    [segments, B, 3, C], what each makes of an empty state. checkpoints_ptr: None or [⌈T/32⌉, B, 3, C]. FULL: all
    segments are multiples of STEPS and there is one. The next STEPS rows are loaded while these are computed."""
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    segment, b, start, stop, c = _place(0, B, T, C, steps, BLOCK)
    inside = None if EVEN else c < C
    w, u = _load(w_ptr + c, inside, None, 0), _load(u_ptr + c, inside, None, 0)
    aa, bb, pp = _state(state_ptr, segment * B + b, C, c, inside, w)
    row = b * T

    ks = _load_steps(k_ptr + (row + start) * C + c, start, stop, C, inside, FULL, STEPS)
    vs = _load_steps(v_ptr + (row + start) * C + c, start, stop, C, inside, FULL, STEPS)
    for t in range(start, stop, STEPS):
        if checkpoints_ptr is not None:
            if t % SAVED == 0:
                _store_three(checkpoints_ptr, t // SAVED * B + b, C, c, inside, aa, bb, pp)
        ahead = tl.minimum(t + STEPS, stop - STEPS) if FULL else t + STEPS
        next_ks = _load_steps(k_ptr + (row + ahead) * C + c, ahead, stop, C, inside, FULL, STEPS)
        next_vs = _load_steps(v_ptr + (row + ahead) * C + c, ahead, stop, C, inside, FULL, STEPS)
        for i in tl.static_range(STEPS):
            valid = None if FULL else t + i < stop
            k, v, w_t = _step(ks[i], vs[i], w, valid, ACC)
            if y_ptr is not None:
                y, _, _ = _mean(aa, bb, pp, k, v, u)
                _store(y_ptr + (row + t) * C + c + i * C, y, inside, valid)
            aa, bb, pp, _, _ = _advance(aa, bb, pp, k, v, w_t)
        ks, vs = next_ks, next_vs

    if y_ptr is None:
        _store_three(final_ptr, segment * B + b, C, c, inside, aa, bb, pp)
    elif stop == T:
        _store_three(final_ptr, b, C, c, inside, aa, bb, tl.where(bb == 0, EMPTY, pp))


@triton.jit(do_not_specialize=["B", "segments", "steps"])
def _scan(
        w_ptr, state_ptr, segments_ptr, B, C, segments, steps, EVEN: tl.constexpr, BLOCK: tl.constexpr,
        STEPS: tl.constexpr):
    """segments_ptr: [segments, B, 3, C]: what each but the last makes of an empty state becomes that before each."""
    _, b, _, _, c = _place(0, B, 0, C, 0, BLOCK)
    inside = None if EVEN else c < C
    w = _load(w_ptr + c, inside, None, 0)
    shift = w * steps
    aa, bb, pp = _state(state_ptr, b, C, c, inside, w)
    for first in range(0, segments, STEPS):
        found = ()
        for i in tl.static_range(STEPS):
            found = found + (_three(segments_ptr, tl.minimum(first + i, segments - 2) * B + b, C, c, inside),)
        for i in tl.static_range(STEPS):
            if first + i < segments:
                _store_three(segments_ptr, (first + i) * B + b, C, c, inside, aa, bb, pp)
            before = _finite(pp + shift)
            f, e = _factors(before, found[i][2])
            aa, bb = f * aa + e * found[i][0], f * bb + e * found[i][1]
            pp = tl.maximum(before, found[i][2])


# ---- backward --------------------------------------------------------------------------------------------------------

@triton.jit
def _beyond(grad_aa, grad_bb, grad_pp, aa, bb):
    """What the gradient of pp holds beyond that of the numerator aa e^pp and the denominator bb e^pp; nothing of a
    state that has seen nothing, whose pp is constant"""
    return tl.where(bb == 0, 0.0, grad_pp - (grad_aa * aa + grad_bb * bb))


@triton.jit(do_not_specialize=["B", "T", "steps"])
def _grad_local(
        grad_y_ptr, grad_state_ptr, w_ptr, u_ptr, k_ptr, v_ptr, checkpoints_ptr, local_ptr, B, T, C, steps,
        FULL: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SAVED: tl.constexpr):
    """local_ptr: [segments, B, 4, C] of each but the first: ga, gb, the factor, and 1 where r passes through all
    steps, else 0; in the last segment, the r that comes out of it.

    The steps run forward: with F = Π f over the segment's steps before t, which is e^{pp_start + nw − pp} ≤ 1,
    ga = Σ F z and gb = −Σ F z y."""
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    segment, b, start, stop, c = _place(1, B, T, C, steps, BLOCK)
    inside = None if EVEN else c < C
    w, u = _load(w_ptr + c, inside, None, 0), _load(u_ptr + c, inside, None, 0)
    aa, bb, pp = _state(checkpoints_ptr, start // SAVED * B + b, C, c, inside, w)
    row = b * T
    ga, gb = tl.zeros_like(w), tl.zeros_like(w)
    factor = ga + 1
    passes = ga + 1

    for t in range(start, stop, STEPS):
        ptrs = (row + t) * C + c
        ks = _load_steps(k_ptr + ptrs, t, stop, C, inside, FULL, STEPS)
        vs = _load_steps(v_ptr + ptrs, t, stop, C, inside, FULL, STEPS)
        if grad_y_ptr is not None:
            gys = _load_steps(grad_y_ptr + ptrs, t, stop, C, inside, FULL, STEPS)
        for i in tl.static_range(STEPS):
            k, v, w_t = _step(ks[i], vs[i], w, None if FULL else t + i < stop, ACC)
            if grad_y_ptr is not None:
                y, past, _ = _mean(aa, bb, pp, k, v, u)
                z = factor * (gys[i].to(ACC) * past)
                ga += z
                gb -= z * y
            if grad_state_ptr is not None:
                passes = tl.where(k > _finite(pp + w_t), 0.0, passes)
            aa, bb, pp, f, _ = _advance(aa, bb, pp, k, v, w_t)
            factor *= f

    if grad_state_ptr is not None:
        if stop == T:
            grad_aa, grad_bb, grad_pp = _three(grad_state_ptr, b, C, c, inside)
            passes = tl.where(passes > 0, _beyond(grad_aa, grad_bb, grad_pp, aa, bb), 0.0)
    ptrs = local_ptr + (segment * B + b) * (4 * C) + c
    _store(ptrs, ga, inside, None)
    _store(ptrs + C, gb, inside, None)
    _store(ptrs + 2 * C, factor, inside, None)
    _store(ptrs + 3 * C, passes, inside, None)


@triton.jit(do_not_specialize=["B", "segments"])
def _grad_scan(
        grad_state_ptr, local_ptr, after_ptr, B, C, segments, EVEN: tl.constexpr, BLOCK: tl.constexpr,
        STEPS: tl.constexpr):
    """after_ptr: [segments, B, 3, C]: ga, gb, r after each segment; of the last, grad_state itself."""
    _, b, _, _, c = _place(0, B, 0, C, 0, BLOCK)
    inside = None if EVEN else c < C
    if grad_state_ptr is None:
        ga = tl.zeros([BLOCK], after_ptr.dtype.element_ty)
        gb, r = ga, ga
    else:
        ga, gb, r = _three(grad_state_ptr, b, C, c, inside)
    _store_three(after_ptr, (segments - 1) * B + b, C, c, inside, ga, gb, r)
    for back in range(0, segments - 1, STEPS):
        found = ()
        for i in tl.static_range(STEPS):
            row = tl.maximum(segments - 1 - back - i, 1) * B + b
            ptrs = local_ptr + row * (4 * C) + c
            found = found + ((_load(ptrs, inside, None, 0), _load(ptrs + C, inside, None, 0),
                              _load(ptrs + 2 * C, inside, None, 0), _load(ptrs + 3 * C, inside, None, 0)),)
        for i in tl.static_range(STEPS):
            segment = segments - 1 - back - i
            ga = found[i][0] + found[i][2] * ga
            gb = found[i][1] + found[i][2] * gb
            r = tl.where(segment == segments - 1, found[i][3], tl.where(found[i][3] > 0, r, 0.0))
            if segment > 0:
                _store_three(after_ptr, (segment - 1) * B + b, C, c, inside, ga, gb, r)


@triton.jit(do_not_specialize=["B", "T", "steps"])
def _backward(
        grad_y_ptr, after_ptr, w_ptr, u_ptr, k_ptr, v_ptr, state_ptr, checkpoints_ptr, scratch_ptr, grad_k_ptr,
        grad_v_ptr, grad_initial_ptr, sums_ptr, B, T, C, steps, R: tl.constexpr, FULL: tl.constexpr,
        EVEN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SAVED: tl.constexpr):
    """after_ptr: [segments, B, 3, C], (ga, gb, r) after each segment, of the last (ga, gb, gradient of pp), or None. R:
    there is an r. scratch_ptr: [programs, 32 / STEPS, 3, BLOCK]. sums_ptr: [segments, B, 2, C]."""
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    segment, b, start, stop, c = _place(0, B, T, C, steps, BLOCK)
    inside = None if EVEN else c < C
    w, u = _load(w_ptr + c, inside, None, 0), _load(u_ptr + c, inside, None, 0)
    row = b * T
    own = tl.arange(0, BLOCK)
    groups_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * (SAVED // STEPS * 3 * BLOCK)
    gw, gu = tl.zeros_like(w), tl.zeros_like(w)
    ga, gb, r = gw, gw, gw
    if after_ptr is not None:
        ga, gb, grad_pp = _three(after_ptr, segment * B + b, C, c, inside)
        if R:
            r = grad_pp

    saved = tl.cdiv(stop - start, SAVED)
    for back in range(0, saved):
        t_0 = start + (saved - 1 - back) * SAVED
        aa, bb, pp = _state(checkpoints_ptr, t_0 // SAVED * B + b, C, c, inside, w)
        groups = tl.cdiv(tl.minimum(stop - t_0, SAVED), STEPS)
        tl.debug_barrier()  # the loads below find what is stored here, and are done before it is stored anew
        _store_three(groups_ptr, 0, BLOCK, own, None, aa, bb, pp)
        for group in range(1, groups):
            t = t_0 + (group - 1) * STEPS  # none but the last group is cut short
            ptrs = (row + t) * C + c
            ks = _load_steps(k_ptr + ptrs, t, stop, C, inside, True, STEPS)
            vs = _load_steps(v_ptr + ptrs, t, stop, C, inside, True, STEPS)
            for i in tl.static_range(STEPS):
                aa, bb, pp, _, _ = _advance(aa, bb, pp, ks[i].to(ACC), vs[i].to(ACC), w)
            _store_three(groups_ptr, group, BLOCK, own, None, aa, bb, pp)
        tl.debug_barrier()

        for group_back in range(0, groups):
            group = groups - 1 - group_back
            t = t_0 + group * STEPS
            ptrs = (row + t) * C + c
            ks = _load_steps(k_ptr + ptrs, t, stop, C, inside, FULL, STEPS)
            vs = _load_steps(v_ptr + ptrs, t, stop, C, inside, FULL, STEPS)
            if grad_y_ptr is not None:
                gys = _load_steps(grad_y_ptr + ptrs, t, stop, C, inside, FULL, STEPS)
            aa, bb, pp = _three(groups_ptr, group, BLOCK, own, None)
            states = ()
            for i in tl.static_range(STEPS):
                states = states + ((aa, bb, pp),)
                if i < STEPS - 1 or R:
                    k, v, w_t = _step(ks[i], vs[i], w, None if FULL else t + i < stop, ACC)
                    aa, bb, pp, _, _ = _advance(aa, bb, pp, k, v, w_t)
            if R:
                r = tl.where(t + STEPS >= T, _beyond(ga, gb, r, aa, bb), r)  # a branch costs 90 registers

            for i in tl.static_range(STEPS - 1, -1, -1):
                valid = None if FULL else t + i < stop
                k, v, w_t = _step(ks[i], vs[i], w, valid, ACC)
                aa, bb, pp = states[i]
                before = _finite(pp + w_t)
                f, e = _factors(before, k)
                grad_v = e * ga
                grad_k = e * (ga * v + gb)
                grad_w = f * (ga * aa + gb * bb)
                if R:
                    lost = k > before
                    grad_k += tl.where(lost, r, 0.0)
                    r = tl.where(lost, 0.0, r)
                    grad_w += r
                gw += grad_w if valid is None else tl.where(valid, grad_w, 0.0)
                ga, gb = f * ga, f * gb
                if grad_y_ptr is not None:
                    gy = gys[i].to(ACC)
                    y, past, present = _mean(aa, bb, pp, k, v, u)
                    s, z = gy * present, gy * past
                    x = s * (v - y)
                    grad_v += s
                    grad_k += x
                    gu += x
                    ga += z
                    gb -= z * y
                _store(grad_k_ptr + ptrs + i * C, grad_k, inside, valid)
                _store(grad_v_ptr + ptrs + i * C, grad_v, inside, valid)

    ptrs = sums_ptr + (segment * B + b) * (2 * C) + c
    _store(ptrs, gw, inside, None)
    _store(ptrs + C, gu, inside, None)
    if grad_initial_ptr is not None:
        if start == 0:
            aa, bb, _ = _three(state_ptr, b, C, c, inside)
            grad_pp = ga * aa + gb * bb + r if T > 0 else r
            _store_three(grad_initial_ptr, b, C, c, inside, ga, gb, tl.where(bb == 0, 0.0, grad_pp))


@triton.jit(do_not_specialize=["parts"])
def _total(sums_ptr, grad_w_ptr, grad_u_ptr, parts, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sums_ptr: [parts, 2, C]; both totals of BLOCK channels, always in the same order"""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc_w = tl.zeros((ROWS, BLOCK), sums_ptr.dtype.element_ty)
    acc_u = acc_w
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)[:, None]
        ptrs = sums_ptr + part.to(tl.int64) * (2 * C) + c
        mask = (part < parts) & (c < C)
        acc_w += tl.load(ptrs, mask=mask, other=0)
        acc_u += tl.load(ptrs + C, mask=mask, other=0)
    tl.store(grad_w_ptr + c, tl.sum(acc_w, 0)[None, :], mask=c < C)  # [ROWS, BLOCK] -> [BLOCK]
    tl.store(grad_u_ptr + c, tl.sum(acc_u, 0)[None, :], mask=c < C)


# ---- launches --------------------------------------------------------------------------------------------------------

ENOUGH_PROGRAMS = 264  # that keep a GPU's memory busy
WANTED_PROGRAMS = 1024  # that time is cut for, where there are not enough
SHORTEST_SEGMENT = 64  # steps

JOIN = 16  # segments whose states a scan loads at once

# {bytes of an element: (channels a lane, STEPS) of forward, of backward}. Backward holds the states of STEPS steps in
# registers: with four channels a lane it spills, or takes fewer steps and moves twice as much through scratch memory.
# With an r to hand on it takes half the steps: with all, it spills where ptxas is less lucky (sm_120, fp16).
CONFIGS = {2: ((4, 8), (2, 8)), 4: ((2, 8), (2, 8))}


def schedule(B, T, C):
    """-> steps of a segment, a multiple of 32; T or more: one segment"""
    programs = B * triton.cdiv(C, 128)
    if programs >= ENOUGH_PROGRAMS or T < 2 * SHORTEST_SEGMENT:
        return triton.cdiv(max(T, 1), SAVED) * SAVED
    return max(SHORTEST_SEGMENT, triton.cdiv(T, triton.cdiv(WANTED_PROGRAMS, programs) * SAVED) * SAVED)


def _options(k, backward=False, R=False):
    """Of the kernels that go through time"""
    _, T, C = k.shape
    if INTERPRETED:
        block, unrolled = 32, 8
    else:
        per_lane, unrolled = CONFIGS[2 if k.dtype.itemsize == 2 else 4][backward]
        block = lanes() * (per_lane if C % 16 == 0 else 1)  # where rows are not aligned, lanes stand side by side
    unrolled = 1 if T == 1 else unrolled // 2 if R else unrolled
    return {"FULL": T > 0 and T % unrolled == 0, "EVEN": C % block == 0, "BLOCK": block, "STEPS": unrolled,
            "SAVED": SAVED, "num_warps": 1}


def _scan_options(C):
    block = 16 if INTERPRETED else lanes()
    return {"EVEN": C % block == 0, "BLOCK": block, "STEPS": JOIN, "num_warps": 1}


def _grid(C, options, *others):
    return (math.prod(others, start=triton.cdiv(C, options["BLOCK"])),)


def forward(w, u, k, v, state, y, final, checkpoints):
    """Writes y: [B, T, C], final: [B, 3, C] and, if it has any, checkpoints[j], the state before step 32 j."""
    B, T, C = k.shape
    if not B * C:
        return
    options, scan_options, steps = _options(k), _scan_options(C), schedule(B, T, C)
    segments = max(1, triton.cdiv(T, steps))
    if segments > 1:
        starts = w.new_empty((segments, B, 3, C))
        _forward[_grid(C, options, B, segments - 1)](  # all but the last segment, which are whole
            w, u, k, v, None, None, starts, None, B, T, C, steps, **options | {"FULL": True})
        _scan[_grid(C, scan_options, B)](w, state, starts, B, C, segments, steps, **scan_options)
        state = starts
    _forward[_grid(C, options, B, segments)](
        w, u, k, v, state, y, final, checkpoints if checkpoints.shape[0] else None, B, T, C, steps, **options)


def backward(grad_y, grad_state, w, u, k, v, state, checkpoints, grad_k, grad_v, grad_state0, grad_w, grad_u):
    """Writes every gradient; grad_y and grad_state may be None, as may state and with it grad_state0."""
    B, T, C = k.shape
    if not C:
        return
    options, scan_options, steps = _options(k, True, grad_state is not None), _scan_options(C), schedule(B, T, C)
    segments = max(1, triton.cdiv(T, steps))
    sums = w.new_empty((segments * B, 2, C))
    if B:
        after = grad_state
        if segments > 1:
            local, after = w.new_empty((segments, B, 4, C)), w.new_empty((segments, B, 3, C))
            _grad_local[_grid(C, options, B, segments - 1)](
                grad_y, grad_state, w, u, k, v, checkpoints, local, B, T, C, steps, **options)
            _grad_scan[_grid(C, scan_options, B)](grad_state, local, after, B, C, segments, **scan_options)
        grid = _grid(C, options, B, segments)
        scratch = w.new_empty((*grid, SAVED // options["STEPS"], 3, options["BLOCK"]))
        _backward[grid](
            grad_y, after, w, u, k, v, state, checkpoints, scratch, grad_k, grad_v, grad_state0, sums, B, T, C, steps,
            grad_state is not None, **options)
    _total[(triton.cdiv(C, 32),)](sums, grad_w, grad_u, segments * B, C, 8, 32, num_warps=2)
