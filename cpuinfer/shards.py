"""A model file as several, and several as one: `cpuinfer split` and `cpuinfer join`.

llama.cpp's layout: parts are called PREFIX-00001-of-00003.gguf; the first has all of the metadata,
and each has `split.no` (from 0 on), `split.count` and `split.tensors.count`. Tensors keep their
order and their bytes.
"""

import errno
import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpuinfer.gguf import GGUFFile, QTensor
from cpuinfer.requantize import raw_metadata
from quant.gguf_writer import DEFAULT_ALIGNMENT, Tensor, write_gguf

Report = Callable[[str, int, int], None]
Parts = list[list[QTensor]]

_MAX_PARTS = 65535  # split.no is an uint16
_KEYS_BYTES = 128  # magic, counts and the three keys of a part, at most


def divide(file: GGUFFile, max_bytes: float = math.inf, max_tensors: float = math.inf) -> Parts:
    """The tensors of each part, no file larger than `max_bytes` or with more than `max_tensors`.

    ValueError where a tensor alone is too large, or the metadata, or where the parts are too many.
    """
    if not (max_bytes >= 1 and max_tensors >= 1):
        raise ValueError("a part has at least one tensor and one byte")
    alignment = file.uint("general.alignment", DEFAULT_ALIGNMENT)
    metadata = raw_metadata(file)
    size = alignment + _KEYS_BYTES + sum(_key_bytes(*item) for item in metadata.items())
    if size > max_bytes:
        raise ValueError(f"the metadata alone takes {size} bytes, more than {max_bytes} allowed")
    parts: Parts = [[]]
    for tensor in file.tensors.values():
        need = _tensor_bytes(tensor, alignment)
        if size + need > max_bytes or len(parts[-1]) == max_tensors:
            parts.append([])
            size = alignment + _KEYS_BYTES
        size += need
        if size > max_bytes:
            raise ValueError(f"{tensor.name} takes {size} bytes, more than {max_bytes} allowed")
        parts[-1].append(tensor)
    if len(parts) > _MAX_PARTS:
        raise ValueError(f"{len(parts)} parts, at most {_MAX_PARTS} are possible")
    return parts


def _key_bytes(key: str, value: Any) -> int:
    # All values are Raw but the alignment.
    return 8 + len(key.encode()) + len(getattr(value, "data", bytes(8)))


def _tensor_bytes(tensor: QTensor, alignment: int) -> int:
    """Bytes of its description and its data, filled up."""
    description = 24 + len(tensor.name.encode()) + 8 * len(tensor.shape)
    return description + tensor.data.nbytes + -tensor.data.nbytes % alignment


def part_paths(prefix: Path, count: int) -> list[Path]:
    """The names of the parts."""
    return [
        prefix.with_name(f"{prefix.name}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]


def split(file: GGUFFile, parts: Parts, paths: Sequence[Path], on_progress: Report) -> None:
    """Write every part to its path, or none.

    `on_progress("split", bytes copied, of how many)`. OSError, also where the disk is too small.
    """
    directory = paths[0].parent
    needed, free = sum(tensor.data.nbytes for part in parts for tensor in part), _free(directory)
    if needed > free:
        reason = f"{os.strerror(errno.ENOSPC)} ({needed / 1e6:.1f} MB are needed)"
        raise OSError(errno.ENOSPC, reason, str(directory))
    copy = _Copies("split", file, on_progress)
    with TemporaryDirectory(prefix=f".{paths[0].name}.", suffix=".tmp", dir=directory) as temporary:
        for number, (tensors, path) in enumerate(zip(parts, paths, strict=True)):
            keys = raw_metadata(file) if number == 0 else {}
            keys |= {
                "split.no": np.uint16(number),
                "split.count": np.uint16(len(parts)),
                "split.tensors.count": np.int32(len(file.tensors)),
            }
            write_gguf(Path(temporary) / path.name, keys, [copy.of(tensor) for tensor in tensors])
        for path in paths:
            os.replace(Path(temporary) / path.name, path)


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory).free


def join(file: GGUFFile, path: Path, on_progress: Report) -> None:
    """Write a split model as one file to `path`, complete or not at all.

    `on_progress("join", bytes copied, of how many)`. ValueError for a file that is not split.
    """
    if "split.count" not in file.metadata:
        raise ValueError(f"{file.path} is not a part of a split model")
    copy = _Copies("join", file, on_progress)
    write_gguf(path, raw_metadata(file), [copy.of(tensor) for tensor in file.tensors.values()])


class _Copies:
    """Tensors to write as they are; how much has been copied is reported."""

    def __init__(self, stage: str, file: GGUFFile, on_progress: Report) -> None:
        self._total = sum(tensor.data.nbytes for tensor in file.tensors.values())
        self._done = 0
        self._report = partial(on_progress, stage)
        self._report(0, self._total)

    def of(self, tensor: QTensor) -> Tensor:
        return Tensor(tensor.name, tensor.qtype, tensor.shape, partial(self._data, tensor))

    def _data(self, tensor: QTensor) -> NDArray[np.uint8]:
        # A copy, so that memory does not fill up with pages of the source.
        data = np.array(tensor.data).reshape(*tensor.shape[:-1], -1)
        tensor.release()
        self._done += tensor.data.nbytes
        self._report(self._done, self._total)
        return data
