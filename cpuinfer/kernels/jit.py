"""How kernels are compiled: the instruction set, the one decorator, the cache on disk.

Kernels are compiled when they are first needed, for one explicit signature each, and kept in a
private directory whose name is a hash of everything that shapes the machine code: all kernel
sources, the versions of Numba and llvmlite, the CPU and the instruction set.  (Numba's own check
sees only the file a function is defined in.)  A damaged cache entry is compiled again.
"""

import hashlib
import os
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba.core import config as _config
from numba.core.caching import FunctionCache
from numba.core.runtime.nrt import rtsys

from cpuinfer import directories, machine

config: Any = _config  # Numba sets its names at run time, where no checker sees them
ISA = machine.instruction_set()


def _target(isa: str) -> tuple[str | None, str | None]:
    """Numba's CPU name and features for an instruction set; (None, None) is this very CPU.

    Code for a set below the machine's own must not use what the larger one has, or nothing would
    be tested.
    """
    if isa == machine.supported_instruction_sets()[0]:
        return None, None
    if isa == "avxvnni":  # 256-bit VNNI, in the EVEX encoding where there is no VEX one
        flags = binding.get_host_cpu_features()
        return "haswell", "+avxvnni" if flags.get("avxvnni") else "+avx512vl,+avx512vnni"
    if isa == "avx2":
        return "haswell", ""
    return "generic" if platform.machine() in ("aarch64", "arm64") else "x86-64", ""


if os.environ.get("NUMBA_CPU_NAME") is None:
    config.CPU_NAME, config.CPU_FEATURES = _target(ISA)


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    cpu = config.CPU_NAME or binding.get_host_cpu_name()
    features = config.CPU_FEATURES
    if features is None:
        features = binding.get_host_cpu_features().flatten()
    versions = (numba.__version__, llvmlite.__version__, sys.version)
    for part in (*versions, cpu, features, ISA, config.BOUNDSCHECK):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()[:16]


#: Of everything that shapes the machine code, and with it every bit of a result.
FINGERPRINT = _fingerprint()


def _open_cache() -> Path | None:
    """The directory for this build's machine code, or None (with one warning) to go without."""
    base = directories.cache_directory()
    warning = base.warning
    if base.path is not None:
        directory = base.path / "kernels" / FINGERPRINT
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return directory
        except OSError as error:
            warning = str(error)
    print(f"cpuinfer: kernels are compiled anew at every start: {warning}", file=sys.stderr)
    return None


CACHE = _open_cache()
if CACHE is not None:
    config.CACHE_DIR = str(CACHE)


class _TolerantCache(FunctionCache):
    """Numba's cache, in which a damaged file means "not cached" and a full disk "do not cache".

    What a kernel closes over is not part of the key: emitted functions have no lasting identity,
    and the directory's name covers their sources.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            # Numba's own load_overload first makes ready all that its compiler knows, 0.1 s of
            # imports (and as much at exit). Machine code needs the symbols of the runtime alone;
            # where something is to be compiled, the compiler makes itself ready.
            rtsys.initialize(target_context)
            return self._load_overload(sig, target_context)
        except Exception:  # a pickle cut anywhere raises anything
            self._discard()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self.disable()
            print(f"cpuinfer: cannot keep a compiled kernel: {error}", file=sys.stderr)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple(), self._py_func.__qualname__

    def _discard(self) -> None:
        for file in Path(self._cache_path).glob(f"{self._impl.filename_base}.*"):
            file.unlink(missing_ok=True)


_compiling = threading.Lock()


class Kernel:
    """A jitted function with one signature, compiled (or loaded) by `prepare` or its first call."""

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self.name = function.__qualname__
        self.signature = signature
        self._ready = False
        self._dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
        if CACHE is not None:
            # What numba's own cache=True sets, to its FunctionCache.
            self._dispatcher._cache = _TolerantCache(function)  # type: ignore[attr-defined]

    def prepare(self) -> bool:
        """Make the machine code ready; True if it had to be compiled."""
        with _compiling:
            if self._ready:
                return False
            self._dispatcher.compile(self.signature)
            # Other types are a mistake, not a reason to compile.
            self._dispatcher.disable_compile()
            self._ready = True
            return not self._dispatcher.stats.cache_hits

    def __call__(self, *arguments: Any) -> Any:
        if not self._ready:
            self.prepare()
        return self._dispatcher(*arguments)


def inner(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Jit a function that kernels call, under a name of its own.

    A cached kernel brings along what it calls, by name.  Two functions of one name, made by one
    closure for two formats and cached by two processes, would be taken for each other.
    """

    def wrap(function: Callable[..., Any]) -> Any:
        function.__name__ = function.__qualname__ = name
        return numba.njit(error_model="numpy")(function)

    return wrap


def kernel(name: str, signature: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """The one decorator of kernels: explicit signature, nogil, no fastmath, cached on disk.

    `name` tells apart kernels that one function makes for several formats.  Numba fuses nothing
    across operations without fastmath, so a kernel's float results are the same on every machine.
    """

    def wrap(function: Callable[..., Any]) -> Kernel:
        function.__name__ = function.__qualname__ = name
        return Kernel(function, signature)

    return wrap
