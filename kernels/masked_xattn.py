"""Masked cross-attention in Triton, explained.

**The operation.** Text token t sees the first n = kv_len[t] audio tokens (kv_len never decreases along t):

    s[t,j] = q[t] · k[j] / sqrt(K)        p[t,j] = exp(s[t,j]) / sum_{i < n} exp(s[t,i])  for j < n, else 0
    o[t]   = sum_j p[t,j] v[j]            n = 0 gives o[t] = 0

Names are those of FlashAttention-2 (arXiv 2307.08691) in small letters, except its block sizes B_r and B_c, here BLOCK_T and
BLOCK_L, its log-sum-exp L, here lse (L is the number of keys), and its D, here delta. b, h, t, j, d index samples, heads, tokens,
keys and the K numbers of a head; dx is the gradient of the loss with respect to x.

**Forward** (section 3.1, algorithm 1). A program owns BLOCK_T queries and walks over the keys in blocks of BLOCK_L, keeping
for every row the maximum m, the sum l = sum exp(s - m) and acc = sum exp(s - m) v. When a block raises m, what was summed so
far is scaled by exp(m_old - m). At the end o = acc / l. The (T, L) scores never reach memory. All exponentials are in base 2,
which the hardware has: the code multiplies s by log2(e), so that exp2 of it is exp(s).

**The mask costs something only at its edge.** Blocks that every row of the program sees whole (all j < min kv_len) need no mask;
then come the blocks that some rows see in part; the walk ends at max kv_len. Keys beyond it are never loaded, so that a NaN there
cannot leak as 0 · NaN.

**Backward** (algorithm 2). Saved is one number per row, lse[t] = m + log2(l), so that p = exp2(s - lse) without another softmax.
An empty row saves lse = +inf: p = exp2(-inf) = 0, no branch. With delta[t] = do[t] · o[t] (= sum_j p dp, from the softmax):

    dp[t,j] = do[t] · v[j]    ds = p (dp - delta)    dq[t] = sum_j ds k[j] / sqrt(K)
    dv[j]   = sum_t p do[t]                          dk[j] = sum_t ds q[t] / sqrt(K)

dq is summed over keys by the program that owns the queries, dk and dv over queries by the program that owns the keys: no two
programs write to one place, so there are no atomics, and every run gives the same bits. As kv_len does not decrease, the queries that
see a key block are all from some t on; that t is the number of queries with kv_len <= the block's first key.

**One token** (decoding, T = 1) is bound by reading keys and values, not by products: the keys are cut into splits so that enough
programs read at once, and a second kernel joins them (Flash-Decoding): o = sum_i o_i exp2(lse_i - lse) over the splits i.

Read before: reference.py; next: residual.py.
"""
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# Triton's interpreter multiplies bf16 as raw bits: there, and only there, products are taken on float32 copies.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
SCAN = tl.constexpr(1024)     # kv_len values read at once when looking for the first token that sees a key block
SPLIT = 512                   # keys a program reads in decoding

# Counts in `do_not_specialize` bound loops and masks of whole rows. For 1, multiples of 16 and other numbers the JIT would compile
# a kernel each: seconds at a new length of text, no better code, and with one head (float32, width 128, triton 3.6) a spill.

# (BLOCK_T, BLOCK_L, warps, pipeline stages) by kernel, then by (head width, bytes of an element). check_compile.py shows that none
# of them spills registers on sm_80 (A100) or sm_90 (H100). Their speed is not measured yet.
CONFIGS = {
    "forward": {(32, 2): (64, 64, 4, 2), (64, 2): (64, 64, 4, 2), (128, 2): (64, 64, 4, 2),
                (32, 4): (32, 32, 4, 1), (64, 4): (32, 32, 4, 1), (128, 4): (32, 16, 8, 1)},
    "forward_long": {(32, 2): (128, 64, 8, 3), (64, 2): (128, 64, 8, 3), (128, 2): (128, 64, 8, 2),
                     (32, 4): (64, 32, 4, 1), (64, 4): (32, 32, 8, 1), (128, 4): (32, 16, 8, 1)},
    "dq": {(32, 2): (64, 64, 4, 2), (64, 2): (64, 64, 4, 2), (128, 2): (64, 64, 8, 2),
           (32, 4): (32, 32, 8, 2), (64, 4): (32, 32, 8, 2), (128, 4): (32, 32, 4, 2)},
    "dkv": {(32, 2): (64, 64, 4, 2), (64, 2): (64, 64, 4, 2), (128, 2): (64, 64, 8, 2),
            (32, 4): (32, 32, 8, 1), (64, 4): (32, 32, 8, 1), (128, 4): (32, 32, 8, 1)},
    "decode": {(width, size): (1, 64, 4, 2) for width in (32, 64, 128) for size in (2, 4)},
}
LONG = 1024                   # audio tokens from which arithmetic, not launch and memory, should bound the forward pass


@triton.jit
def product(a, b, acc):
    """acc + a b in float32; float32 inputs are multiplied as float32 (no TF32)."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_keys(k_ptr, v_ptr, j, high, stride_l, K: tl.constexpr, EDGE: tl.constexpr):
    """k and v of the keys j; at the EDGE those from `high` on are not read."""
    offset = j[:, None] * stride_l + tl.arange(0, K)[None, :]
    if EDGE:
        return tl.load(k_ptr + offset, mask=j[:, None] < high, other=0.0), tl.load(v_ptr + offset, mask=j[:, None] < high, other=0.0)
    else:
        return tl.load(k_ptr + offset), tl.load(v_ptr + offset)


@triton.jit
def walk_keys(q, acc, m, l, k_ptr, v_ptr, n, low, high, stride_l, K: tl.constexpr, BLOCK_L: tl.constexpr,
              EDGE: tl.constexpr):
    """Online softmax over the keys low .. high-1. EDGE: row t stops at its own n[t]; otherwise all rows see all of them."""
    scale = LOG2E * K ** -0.5
    for start in range(low, high, BLOCK_L):
        j = start + tl.arange(0, BLOCK_L)
        k, v = load_keys(k_ptr, v_ptr, j, high, stride_l, K, EDGE)
        s = product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_L], tl.float32))
        if EDGE:
            s = tl.where(j[None, :] < n[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)                 # a number is scaled and shifted in one instruction, below
        shift = m_new
        if EDGE:
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)    # a row that has seen no key yet: no inf - inf
        p = tl.exp2(s * scale - shift[:, None])
        shrink = tl.exp2(m - shift)
        l = l * shrink + tl.sum(p, 1)
        acc = product(p.to(v.dtype), v, acc * shrink[:, None])
        m = m_new
    return acc, m, l


@triton.jit(do_not_specialize=["T", "H"])
def xattn_forward(q_ptr, k_ptr, v_ptr, n_ptr, o_ptr, lse_ptr, T, H, q_b, q_h, q_t, k_b, k_h, k_l, o_b, o_h, o_t,
                  K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr):
    """Grid (blocks of T, B·H). q, o (B, H, T, K); k, v (B, H, L, K); n = kv_len (B, T); lse (B, H, T) float32, base 2."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d, inside = tl.arange(0, K), t < T
    q = tl.load(q_ptr + b * q_b + h * q_h + t[:, None] * q_t + d[None, :], mask=inside[:, None], other=0.0)
    n = tl.load(n_ptr + b * T + t, mask=inside, other=0)
    longest = tl.max(n, 0)
    whole = tl.min(tl.where(inside, n, longest), 0) // BLOCK_L * BLOCK_L     # keys in blocks that every row sees
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, K], tl.float32)
    k_ptr, v_ptr = k_ptr + b * k_b + h * k_h, v_ptr + b * k_b + h * k_h
    acc, m, l = walk_keys(q, acc, m, l, k_ptr, v_ptr, n, 0, whole, k_l, K, BLOCK_L, False)
    acc, m, l = walk_keys(q, acc, m, l, k_ptr, v_ptr, n, whole, longest, k_l, K, BLOCK_L, True)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("inf"), m + tl.log2(l))
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * T + t, lse, mask=inside)
    o = (acc / l[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + b * o_b + h * o_h + t[:, None] * o_t + d[None, :], o, mask=inside[:, None])


@triton.jit
def walk_keys_back(q, do, lse, delta, dq, k_ptr, v_ptr, n, low, high, stride_l, K: tl.constexpr, BLOCK_L: tl.constexpr,
                   EDGE: tl.constexpr):
    """dq + the sum of ds k over the keys low .. high-1; EDGE as in `walk_keys`."""
    for start in range(low, high, BLOCK_L):
        j = start + tl.arange(0, BLOCK_L)
        k, v = load_keys(k_ptr, v_ptr, j, high, stride_l, K, EDGE)
        s = product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_L], tl.float32))
        p = tl.exp2(s * (LOG2E * K ** -0.5) - lse[:, None])
        if EDGE:
            p = tl.where(j[None, :] < n[:, None], p, 0.0)
        dp = product(do, tl.trans(v), tl.zeros([q.shape[0], BLOCK_L], tl.float32))
        dq = product((p * (dp - delta[:, None])).to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["T", "H"])
def xattn_dq(q_ptr, k_ptr, v_ptr, n_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, T, H,
             q_b, q_h, q_t, k_b, k_h, k_l, o_b, o_h, o_t, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr):
    """Grid (blocks of T, B·H). The forward walk again, now summing ds k. do and dq have the strides of o; writes delta (B, H, T) for xattn_dkv."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d, inside = tl.arange(0, K), t < T
    rows = tl.program_id(1).to(tl.int64) * T + t
    o_offset = b * o_b + h * o_h + t[:, None] * o_t + d[None, :]
    q = tl.load(q_ptr + b * q_b + h * q_h + t[:, None] * q_t + d[None, :], mask=inside[:, None], other=0.0)
    o = tl.load(o_ptr + o_offset, mask=inside[:, None], other=0.0)
    do = tl.load(do_ptr + o_offset, mask=inside[:, None], other=0.0)
    n = tl.load(n_ptr + b * T + t, mask=inside, other=0)
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=inside)
    longest = tl.max(n, 0)
    whole = tl.min(tl.where(inside, n, longest), 0) // BLOCK_L * BLOCK_L
    dq = tl.zeros([BLOCK_T, K], tl.float32)
    k_ptr, v_ptr = k_ptr + b * k_b + h * k_h, v_ptr + b * k_b + h * k_h
    dq = walk_keys_back(q, do, lse, delta, dq, k_ptr, v_ptr, n, 0, whole, k_l, K, BLOCK_L, False)
    dq = walk_keys_back(q, do, lse, delta, dq, k_ptr, v_ptr, n, whole, longest, k_l, K, BLOCK_L, True)
    tl.store(dq_ptr + o_offset, (dq * K ** -0.5).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def walk_queries(k, v, dk, dv, j, q_ptr, do_ptr, n_ptr, lse_ptr, delta_ptr, low, high, T, q_t, o_t,
                 K: tl.constexpr, BLOCK_T: tl.constexpr, EDGE: tl.constexpr):
    """Sums p do and ds q over the tokens low .. high-1. EDGE: token t sees key j only if j < n[t]."""
    d = tl.arange(0, K)
    for start in range(low, high, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < T
        q = tl.load(q_ptr + t[:, None] * q_t + d[None, :], mask=inside[:, None], other=0.0)
        do = tl.load(do_ptr + t[:, None] * o_t + d[None, :], mask=inside[:, None], other=0.0)
        lse = tl.load(lse_ptr + t, mask=inside, other=0.0)             # behind the last token p is 1, times q = do = 0
        delta = tl.load(delta_ptr + t, mask=inside, other=0.0)
        # Both products start from what is to be subtracted: afterwards, ptxas of triton 3.6 would let every wgmma wait for the one before.
        s = product(k, tl.trans(q), tl.zeros([k.shape[0], BLOCK_T], tl.float32) - (lse * (1 / (LOG2E * K ** -0.5)))[None, :])
        p = tl.exp2(s * (LOG2E * K ** -0.5))
        if EDGE:
            n = tl.load(n_ptr + t, mask=inside, other=0)
            p = tl.where(j[:, None] < n[None, :], p, 0.0)
        dv = product(p.to(do.dtype), do, dv)
        dp = product(v, tl.trans(do), tl.zeros([k.shape[0], BLOCK_T], tl.float32) - delta[None, :])
        dk = product((p * dp).to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["L", "H"])
def xattn_dkv(q_ptr, k_ptr, v_ptr, n_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, T, L, H,
              q_b, q_h, q_t, k_b, k_h, k_l, o_b, o_h, o_t, dk_b, dk_h, dk_l,
              K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr):
    """Grid (blocks of L, B·H). Walks over the tokens that see this block of keys; the rest see none of it."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    first_key = tl.program_id(0) * BLOCK_L
    j, d = first_key + tl.arange(0, BLOCK_L), tl.arange(0, K)
    n_ptr += b * T
    blind, partial = 0, 0                                               # tokens that see no key of this block; that do not see all of it
    for start in range(0, T, SCAN):
        t = start + tl.arange(0, SCAN)
        n = tl.load(n_ptr + t, mask=t < T, other=2147483647)
        blind += tl.sum((n <= first_key).to(tl.int32), 0)
        partial += tl.sum((n < first_key + BLOCK_L).to(tl.int32), 0)
    used = tl.load(n_ptr + T - 1)                                       # the last token sees all that any token sees
    offset = b * k_b + h * k_h + j[:, None] * k_l + d[None, :]          # not load_keys: with it the float32 tiles spill
    k = tl.load(k_ptr + offset, mask=j[:, None] < used, other=0.0)
    v = tl.load(v_ptr + offset, mask=j[:, None] < used, other=0.0)
    dk = tl.zeros([BLOCK_L, K], tl.float32)
    dv = tl.zeros([BLOCK_L, K], tl.float32)
    q_ptr, do_ptr = q_ptr + b * q_b + h * q_h, do_ptr + b * o_b + h * o_h
    row = tl.program_id(1).to(tl.int64) * T
    lse_ptr, delta_ptr = lse_ptr + row, delta_ptr + row
    low = blind // BLOCK_T * BLOCK_T                                    # tokens before low see none of it, tokens from edge on all
    edge = tl.minimum((partial + BLOCK_T - 1) // BLOCK_T * BLOCK_T, T)
    dk, dv = walk_queries(k, v, dk, dv, j, q_ptr, do_ptr, n_ptr, lse_ptr, delta_ptr, low, edge, T, q_t, o_t,
                          K, BLOCK_T, True)
    dk, dv = walk_queries(k, v, dk, dv, j, q_ptr, do_ptr, n_ptr, lse_ptr, delta_ptr, edge, T, T, q_t, o_t,
                          K, BLOCK_T, False)
    offset = b * dk_b + h * dk_h + j[:, None] * dk_l + d[None, :]
    tl.store(dk_ptr + offset, (dk * K ** -0.5).to(dk_ptr.dtype.element_ty), mask=j[:, None] < L)
    tl.store(dv_ptr + offset, dv.to(dv_ptr.dtype.element_ty), mask=j[:, None] < L)


@triton.jit(do_not_specialize=["H"])
def xattn_decode(q_ptr, k_ptr, v_ptr, n_ptr, o_ptr, lse_ptr, H, q_b, q_h, k_b, k_h, k_l,
                 K: tl.constexpr, BLOCK_L: tl.constexpr, SPLIT: tl.constexpr):
    """Grid (splits, B·H), T = 1: o (splits, B·H, K) and lse (splits, B·H) of one query on the SPLIT keys from split·SPLIT on."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    d = tl.arange(0, K)
    q = tl.load(q_ptr + b * q_b + h * q_h + d).to(tl.float32) * (LOG2E * K ** -0.5)
    low = tl.program_id(0) * SPLIT
    high = tl.minimum(tl.load(n_ptr + b), low + SPLIT)
    m, l, acc = float("-inf"), 0.0, tl.zeros([K], tl.float32)
    for start in range(low, high, BLOCK_L):                             # every block has a key, so m becomes finite at once
        j = start + tl.arange(0, BLOCK_L)
        offset = b * k_b + h * k_h + j[:, None] * k_l + d[None, :]
        k = tl.load(k_ptr + offset, mask=j[:, None] < high, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offset, mask=j[:, None] < high, other=0.0).to(tl.float32)
        s = tl.where(j < high, tl.sum(q[None, :] * k, 1), float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        p, shrink = tl.exp2(s - m_new), tl.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)
        m = m_new
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(lse_ptr + row, tl.where(l == 0.0, float("inf"), m + tl.log2(tl.where(l == 0.0, 1.0, l))))
    tl.store(o_ptr + row * K + d, (acc / tl.where(l == 0.0, 1.0, l)).to(o_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["splits", "rows"])
def xattn_join(part_ptr, lse_part_ptr, o_ptr, lse_ptr, splits, rows, K: tl.constexpr, SPLITS: tl.constexpr):
    """Grid (B·H): o = sum_i o_i w_i / sum_i w_i with w_i = exp2(lse_i - max). A split without keys (lse = +inf) has w = 0."""
    i, d, row = tl.arange(0, SPLITS), tl.arange(0, K), tl.program_id(0)
    lse = tl.load(lse_part_ptr + i * rows + row, mask=i < splits, other=float("inf"))
    lse = tl.where(lse == float("inf"), float("-inf"), lse)
    m = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(weight, 0)
    safe = tl.where(total == 0.0, 1.0, total)
    part = tl.load(part_ptr + (i[:, None] * rows + row) * K + d[None, :], mask=i[:, None] < splits, other=0.0)
    tl.store(o_ptr + row * K + d, (tl.sum(part * weight[:, None], 0) / safe).to(o_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("inf"), m + tl.log2(safe)))


def config(kernel: str, q: Tensor) -> dict:
    """Tile sizes, warps and pipeline stages of a kernel, as keyword arguments of its launch."""
    block_t, block_l, warps, stages = CONFIGS[kernel][q.shape[-1], q.element_size()]
    blocks = {"BLOCK_L": block_l} if kernel == "decode" else {"BLOCK_T": block_t, "BLOCK_L": block_l}
    return {"K": q.shape[-1], "num_warps": warps, "num_stages": stages, **blocks}


def empty_BXHK(x: Tensor) -> Tensor:
    """An uninitialised (B, H, X, K) whose memory is (B, X, H, K): joining the heads afterwards moves nothing."""
    b, h, n, k = x.shape
    return x.new_empty(b, n, h, k).transpose(1, 2)


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def same_strides(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as the kernels take them: the same strides, rows contiguous. Copies only if they are not so already."""
    if k.stride() == v.stride() and k.stride(-1) == 1:
        return k, v
    return k.contiguous(), v.contiguous()


@torch.library.custom_op("af_min::masked_xattn", mutates_args=())
def forward_op(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor) -> tuple[Tensor, Tensor]:
    """o (B, H, T, K) and the base-2 log-sum-exp of every row (B, H, T), float32."""
    (B, H, T, K), L = q.shape, k.shape[2]
    o, lse = empty_BXHK(q), q.new_empty(B, H, T, dtype=torch.float32)
    if q.numel() == 0 or L == 0:
        return o.zero_(), lse.fill_(float("inf"))
    q, (k, v), n = rows_contiguous(q), same_strides(k, v), kv_len.to(torch.int32).contiguous()
    with torch.cuda.device_of(q):
        if T > 1:
            settings = config("forward_long" if L >= LONG else "forward", q)
            xattn_forward[triton.cdiv(T, settings["BLOCK_T"]), B * H](
                q, k, v, n, o, lse, T, H, *q.stride()[:3], *k.stride()[:3], *o.stride()[:3], **settings)
            return o, lse
        splits, rows = triton.cdiv(L, SPLIT), B * H
        parts = o if splits == 1 else q.new_empty(splits, B, H, K, dtype=torch.float32)
        lse_parts = lse if splits == 1 else q.new_empty(splits, B, H, dtype=torch.float32)
        xattn_decode[splits, rows](q, k, v, n, parts, lse_parts, H, *q.stride()[:2], *k.stride()[:3],
                                   SPLIT=SPLIT, **config("decode", q))
        if splits > 1:
            xattn_join[rows,](parts, lse_parts, o, lse, splits, rows, K=K, SPLITS=triton.next_power_of_2(splits))
    return o, lse


@forward_op.register_fake
def _(q, k, v, kv_len):
    return empty_BXHK(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("af_min::masked_xattn_backward", mutates_args=())
def backward_op(do: Tensor, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, o: Tensor,
                lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, T, _), L = q.shape, k.shape[2]
    dq, dk, dv = empty_BXHK(q), empty_BXHK(k), empty_BXHK(k)
    if q.numel() == 0 or L == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, (k, v), n = rows_contiguous(q), same_strides(k, v), kv_len.to(torch.int32).contiguous()
    if o.stride() != dq.stride():
        o = empty_BXHK(o).copy_(o)
    if do.stride() != o.stride():
        do = empty_BXHK(do).copy_(do)
    delta = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *o.stride()[:3])
    with torch.cuda.device_of(q):
        settings = config("dq", q)
        xattn_dq[triton.cdiv(T, settings["BLOCK_T"]), B * H](
            q, k, v, n, o, do, lse, delta, dq, T, H, *strides, **settings)
        settings = config("dkv", q)
        xattn_dkv[triton.cdiv(L, settings["BLOCK_L"]), B * H](
            q, k, v, n, do, lse, delta, dk, dv, T, L, H, *strides, *dk.stride()[:3], **settings)
    return dq, dk, dv


@backward_op.register_fake
def _(do, q, k, v, kv_len, o, lse):
    return empty_BXHK(q), empty_BXHK(k), empty_BXHK(k)


def save_for_backward(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)             # no zeros in place of dlse, which nobody asks for
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, do, dlse):
    return *backward_op(do, *ctx.saved_tensors), None


forward_op.register_autograd(backward, setup_context=save_for_backward)


def masked_cross_attention(q_BHTK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, kv_len: Tensor) -> Tensor:
    """The operation of reference.py on the kernels above. q, k, v of one dtype; the output has it too."""
    assert q_BHTK.dtype == k_BHLK.dtype == v_BHLK.dtype, \
        f"got q {q_BHTK.dtype}, k {k_BHLK.dtype}, v {v_BHLK.dtype}, expected one dtype"
    B, H = q_BHTK.shape[:2]
    assert B * H < 1 << 16, f"got B·H = {B * H}, expected at most 65535: the second axis of a launch ends there"
    return forward_op(q_BHTK, k_BHLK, v_BHLK, kv_len)[0]
