"""Floats of 16 bits, as numbers uint16, from and to float32.

Bits and float32 arithmetic alone, so that all of it is done in vectors on any CPU; NumPy's own
casts take several times as long.
"""

import numpy as np
from numba import float32, uint16

from quant.kernels.jit import inner, inputs, kernel, results

f4, u2, u4 = np.float32, np.uint16, np.uint32


@inner
def _to_f16(v):
    """To the nearest, ties to even, with the float32 unit rounding: ggml_compute_fp32_to_fp16."""
    bits = np.float32(v).view(np.uint32)
    magnitude = u4(bits + bits)  # without the sign
    # A number so large that in their sum the last bit kept is a half's last bit.
    exponent = max(u4(magnitude & u4(0xFF000000)), u4(0x71000000))
    anchor = u4(u4(exponent >> u4(1)) + u4(0x07800000)).view(np.float32)
    scaled = abs(v) * f4(2.0**112) * f4(2.0**-110)
    total = np.float32(anchor + scaled).view(np.uint32)
    number = u4(u4(total >> u4(13)) & u4(0x7C00)) + u4(total & u4(0xFFF))
    number = u4(0x7E00) if magnitude > u4(0xFF000000) else u4(number)
    return u2(u4(bits >> u4(16)) & u4(0x8000) | number)


@kernel(inputs(float32, 1), results(uint16, 1))
def to_f16(x, out):
    """IEEE 754 halves, to the nearest, ties to even"""
    for i in range(len(x)):
        out[i] = _to_f16(x[i])


@kernel(inputs(uint16, 1), results(float32, 1))
def from_f16(halves, out):
    """Exact: ggml_compute_fp16_to_fp32"""
    for i in range(len(halves)):
        sign = u4(u4(halves[i]) & u4(0x8000)) << u4(16)
        magnitude = u4(u4(halves[i]) & u4(0x7FFF))
        normal = u4(u4(magnitude << u4(13)) + u4(0x70000000)).view(np.float32) * f4(2.0**-112)
        small = u4(magnitude | u4(0x3F000000)).view(np.float32) - f4(0.5)
        value = small if magnitude < u4(0x400) else normal
        out[i] = u4(np.float32(value).view(np.uint32) | sign).view(np.float32)


@kernel(inputs(float32, 1), results(uint16, 1))
def to_bf16(x, out):
    """The upper 16 bits, to the nearest, ties to even; NaN stays NaN"""
    for i in range(len(x)):
        bits = np.float32(x[i]).view(np.uint32)
        rounded = u4(bits + u4(u4(0x7FFF) + u4(u4(bits >> u4(16)) & u4(1))))
        nan = u4(bits & u4(0x7FFFFFFF)) > u4(0x7F800000)
        out[i] = u2(u4(u4(bits | u4(0x400000)) if nan else rounded) >> u4(16))
