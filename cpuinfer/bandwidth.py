"""The bandwidth of this computer's memory, measured once and kept.

It is kept in `bandwidth.json` of the user's cache directory as {CPU: {threads: GB/s}}. Where that
is damaged or cannot be written it is measured again, which takes about a second.
"""

import json
from contextlib import suppress
from pathlib import Path

from cpuinfer import directories, machine
from quant.partial_file import write_private

_Kept = dict[str, dict[str, float]]


def known(threads: int) -> float:
    """GB/s that `threads` threads read together: what was measured last, or is measured now."""
    path = _path()
    found = 0.0 if path is None else _read(path).get(machine.cpu_model(), {}).get(str(threads), 0.0)
    return found or measured(threads)


def measured(threads: int) -> float:
    """GB/s that `threads` threads read together now, kept for the next time."""
    gbs = machine.read_bandwidth(threads)
    path = _path()
    if path is not None:
        kept = _read(path)
        kept.setdefault(machine.cpu_model(), {})[str(threads)] = round(gbs, 2)
        with suppress(OSError):  # then it is measured again
            write_private(path, json.dumps(kept).encode())
    return gbs


def _path() -> Path | None:
    directory = directories.cache_directory().path
    return None if directory is None else directory / "bandwidth.json"


def _read(path: Path) -> _Kept:
    """What is kept, without entries that are none."""
    try:
        document = json.loads(path.read_bytes())
        return {
            str(cpu): {str(threads): float(gbs) for threads, gbs in entries.items() if _is_gbs(gbs)}
            for cpu, entries in document.items()
        }
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _is_gbs(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < 100_000
