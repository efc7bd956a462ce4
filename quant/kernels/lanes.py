"""Groups side by side in the lanes of vectors: what the searches of ggml-quants.c share.

A group is a row of an array (n, size); a strip (size, STRIP) float32 holds STRIP of them, one in
each lane.  All that is summed over a group is then summed in GGML's order, STRIP sums at a time.
"""

import numpy as np

from quant.kernels.jit import inner

STRIP = 64

f4, i4 = np.float32, np.int32


@inner
def level(v, lowest, highest):
    """nearest_int of ggml-quants.c, then its limits; int32

    Halves go to even.  Beyond 2**22, for infinities and NaN it is what C's bits give.
    """
    bits = np.float32(v + f4(12582912)).view(np.int32)
    return min(max(i4(i4(bits & i4(0x7FFFFF)) - i4(0x400000)), lowest), highest)


@inner
def load(x, start, strip):
    """Groups of x from `start` on become lanes; the last one again where there are too few."""
    for j in range(STRIP):
        row = x[min(start + j, len(x) - 1)]
        for i in range(x.shape[1]):
            strip[i, j] = row[i]


@inner
def store(strip, start, offset, q):
    """Lanes become groups of q, with `offset` added."""
    for j in range(min(STRIP, len(q) - start)):
        row = q[start + j]
        for i in range(q.shape[1]):
            row[i] = np.uint8(i4(strip[i, j]) + offset)


@inner
def take(level, better, found):
    """Keep the integers of the lanes that are better."""
    for i in range(len(level)):
        for j in range(STRIP):
            found[i, j] = level[i, j] if better[j] else found[i, j]
