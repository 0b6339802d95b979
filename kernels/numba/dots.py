"""Dot products of weight rows, read where they lie, with float32 vectors; for compiled code.

Eight rows at a time: that many streams keep a core's memory reads going, where one row alone waits half of the
time. For four vectors, four rows at a time, so that widening a weight serves all four.
"""

from __future__ import annotations

import numpy as np

from dsopt.kernels.numba.runtime import inner, widen

ROWS = 8


@inner
def _dot(w, row, x, at, n):
    w, x = w[row : row + n], x[at : at + n]
    total = np.float32(0)
    for k in range(n):
        total += widen(w[k]) * x[k]
    return total


@inner
def _dots_8(w, row, step, x, at, n):
    """Dots of rows row, row + step, ... of w with x[at : at + n]."""
    w0, w1 = w[row : row + n], w[row + step : row + step + n]
    w2, w3 = w[row + 2 * step : row + 2 * step + n], w[row + 3 * step : row + 3 * step + n]
    w4, w5 = w[row + 4 * step : row + 4 * step + n], w[row + 5 * step : row + 5 * step + n]
    w6, w7 = w[row + 6 * step : row + 6 * step + n], w[row + 7 * step : row + 7 * step + n]
    x = x[at : at + n]
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(0)
    for k in range(n):
        v = x[k]
        a0 += widen(w0[k]) * v
        a1 += widen(w1[k]) * v
        a2 += widen(w2[k]) * v
        a3 += widen(w3[k]) * v
        a4 += widen(w4[k]) * v
        a5 += widen(w5[k]) * v
        a6 += widen(w6[k]) * v
        a7 += widen(w7[k]) * v
    return a0, a1, a2, a3, a4, a5, a6, a7


@inner
def _dots_4_by_4(w, row, step, x, i0, i1, i2, i3, n):
    """Dots of rows row, row + step, ... of w with each of x[i0 : i0 + n], ..."""
    w0, w1 = w[row : row + n], w[row + step : row + step + n]
    w2, w3 = w[row + 2 * step : row + 2 * step + n], w[row + 3 * step : row + 3 * step + n]
    x0, x1, x2, x3 = x[i0 : i0 + n], x[i1 : i1 + n], x[i2 : i2 + n], x[i3 : i3 + n]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for k in range(n):
        p, q, r, s = widen(w0[k]), widen(w1[k]), widen(w2[k]), widen(w3[k])
        v0, v1, v2, v3 = x0[k], x1[k], x2[k], x3[k]
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
