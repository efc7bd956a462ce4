"""How far the values of a written tensor are from those they were made of."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.ggml_types import GGMLType as T

#: The relative error (see `Errors`) that a type may have; what is above it is no rounding any more.
#: Normal weights have a half of it or less, and a block of one large value among small ones does
#: not reach it.
BOUNDS = {
    T.F32: 0.0,
    T.F16: 1e-3,
    T.BF16: 4e-3,
    T.Q8_0: 0.02,
    T.Q6_K: 0.05,
    T.Q5_1: 0.12,
    T.Q5_K: 0.12,
    T.Q5_0: 0.18,
    T.Q4_1: 0.25,
    T.Q4_K: 0.25,
    T.Q4_0: 0.36,
    T.Q3_K: 0.5,
    T.Q2_K: 0.7,
}


@dataclass(frozen=True)
class Errors:
    """Of some values: sums of squares of the source and of the differences, the largest
    difference, and how many written values are no finite numbers."""

    squares: float = 0.0
    squared_errors: float = 0.0
    max_error: float = 0.0
    n_bad: int = 0

    @property
    def relative(self) -> float:
        """Root mean square of the differences over that of the source."""
        if self.squared_errors == 0:
            return 0.0
        return float(np.sqrt(self.squared_errors / self.squares)) if self.squares else np.inf

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(
            self.squares + other.squares,
            self.squared_errors + other.squared_errors,
            max(self.max_error, other.max_error),
            self.n_bad + other.n_bad,
        )


def errors(source: NDArray[np.float32], written: NDArray[np.float32]) -> Errors:
    """Of arrays of one shape; values that are not finite count as `n_bad` alone."""
    good = np.isfinite(written)
    n_bad = int(good.size - np.count_nonzero(good))
    if n_bad:
        source, written = source[good], written[good]
    if not written.size:
        return Errors(n_bad=n_bad)
    difference = written - source
    return Errors(
        float(np.sum(np.square(source), dtype=np.float64)),
        float(np.sum(np.square(difference), dtype=np.float64)),
        float(np.abs(difference).max()),
        n_bad,
    )
