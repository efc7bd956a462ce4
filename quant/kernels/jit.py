"""How this package uses Numba: one decorator, compiled when first called, kept on disk.

Importing this takes Numba's half second, so only what quantizes imports it, when it does.
"""

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

_compiling = threading.Lock()
_SOURCES = hashlib.sha256(
    b"".join(file.read_bytes() for file in sorted(Path(__file__).parents[1].rglob("*.py")))
).hexdigest()


class _TolerantCache(FunctionCache):
    """Numba's cache, in which a damaged file means "not cached" and a full disk "do not cache".

    Numba looks for changes in the file of a function alone; here the key covers all of them.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a pickle cut anywhere raises anything
            for file in Path(self._cache_path).glob(f"{self._impl.filename_base}.*"):
                file.unlink(missing_ok=True)
            return None

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), _SOURCES)

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            self.disable()


class Kernel:
    """A jitted function with one signature, compiled (or loaded) by its first call."""

    def __init__(self, function: Callable[..., None], signature: Any) -> None:
        self._signature = signature
        self._ready = False
        self._dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
        with suppress(RuntimeError):  # no directory can be written: each process compiles anew
            # What Numba's own cache=True sets, to its FunctionCache.
            self._dispatcher._cache = _TolerantCache(function)  # type: ignore[attr-defined]

    def prepare(self) -> None:
        """Make the machine code ready."""
        with _compiling:
            if not self._ready:
                self._dispatcher.compile(self._signature)
                # Other types are a mistake, not a reason to compile.
                self._dispatcher.disable_compile()
                self._ready = True

    def __call__(self, *arguments: Any) -> None:
        if not self._ready:
            self.prepare()
        self._dispatcher(*arguments)


def kernel(*arguments: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Explicit types, nogil, no fastmath: the arithmetic is the written one, in its order."""
    return lambda function: Kernel(function, numba.void(*arguments))


def inputs(dtype: Any, ndim: int) -> Any:
    """The type of contiguous arrays that a kernel only reads: views of a mapped file, too."""
    return numba.types.Array(dtype, ndim, "C", readonly=True)


def results(dtype: Any, ndim: int) -> Any:
    """The type of contiguous arrays that a kernel writes."""
    return numba.types.Array(dtype, ndim, "C")


inner = numba.njit(error_model="numpy")  # for functions that kernels call

INT, FLOAT, FLAG = numba.int32, numba.float32, numba.boolean
GROUPS = inputs(FLOAT, 2)  # (n, size)
SCALES = results(FLOAT, 1)  # (n,)
LEVELS = results(numba.uint8, 2)  # (n, size)
