"""Dot products of weight rows, read where they lie, with float32 vectors; for compiled code.

Eight rows at a time: that many streams keep a core's memory reads going, where one row alone waits half of the
time. For four vectors, four rows at a time, so that widening a weight serves all four. Indices in inner loops are
unsigned, since a signed one may count from the end, which costs a select each and time to compile.
"""

from __future__ import annotations

import numpy as np

from dsopt.kernels.numba.runtime import inner, widen

ROWS = 8
# beside an unsigned index every number is to be unsigned
U2, U3, U4 = np.uint64(2), np.uint64(3), np.uint64(4)


@inner
def _dot(w, row, x, at, n):
    row, at = np.uint64(row), np.uint64(at)
    total = np.float32(0)
    for k in range(np.uint64(n)):
        total += widen(w[row + k]) * x[at + k]
    return total


@inner
def _dots_8(w, row, step, x, at, n):
    """Dots of rows row, row + step, ... of w with x[at : at + n]."""
    r0, step, at = np.uint64(row), np.uint64(step), np.uint64(at)
    r1, r2, r3, r4 = r0 + step, r0 + step * U2, r0 + step * U3, r0 + step * U4
    r5, r6, r7 = r4 + step, r4 + step * U2, r4 + step * U3
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(0)
    for k in range(np.uint64(n)):
        v = x[at + k]
        a0 += widen(w[r0 + k]) * v
        a1 += widen(w[r1 + k]) * v
        a2 += widen(w[r2 + k]) * v
        a3 += widen(w[r3 + k]) * v
        a4 += widen(w[r4 + k]) * v
        a5 += widen(w[r5 + k]) * v
        a6 += widen(w[r6 + k]) * v
        a7 += widen(w[r7 + k]) * v
    return a0, a1, a2, a3, a4, a5, a6, a7


@inner
def _dots_4_by_4(w, row, step, x, at0, at1, at2, at3, n):
    """Dots of rows row, row + step, ... of w with each of x[at0 : at0 + n], ..."""
    r0, step = np.uint64(row), np.uint64(step)
    r1, r2, r3 = r0 + step, r0 + step * U2, r0 + step * U3
    t0, t1, t2, t3 = np.uint64(at0), np.uint64(at1), np.uint64(at2), np.uint64(at3)
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for k in range(np.uint64(n)):
        p, q, r, s = widen(w[r0 + k]), widen(w[r1 + k]), widen(w[r2 + k]), widen(w[r3 + k])
        v0, v1, v2, v3 = x[t0 + k], x[t1 + k], x[t2 + k], x[t3 + k]
        a0 += p * v0
        a1 += q * v0
        a2 += r * v0
        a3 += s * v0
        b0 += p * v1
        b1 += q * v1
        b2 += r * v1
        b3 += s * v1
        c0 += p * v2
        c1 += q * v2
        c2 += r * v2
        c3 += s * v2
        d0 += p * v3
        d1 += q * v3
        d2 += r * v3
        d3 += s * v3
    return (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3)


@inner
def rows_dot(w, row, step, rows, x, at, n, out):
    """out[t, i] = sum_k w[row + i * step + k] * x[at[t] + k] for i < rows <= ROWS and k < n; out (len(at), ROWS)."""
    count = at.size
    if rows < ROWS:
        for i in range(rows):
            for t in range(count):
                out[t, i] = _dot(w, row + i * step, x, at[t], n)
        return
    t = 0
    while t + 4 <= count:
        for half in range(0, ROWS, 4):
            four = _dots_4_by_4(w, row + half * step, step, x, at[t], at[t + 1], at[t + 2], at[t + 3], n)
            for j in range(4):
                for i in range(4):
                    out[t + j, half + i] = four[j][i]
        t += 4
    while t < count:
        eight = _dots_8(w, row, step, x, at[t], n)
        for i in range(ROWS):
            out[t, i] = eight[i]
        t += 1
