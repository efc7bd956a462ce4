"""A checkpoint in Hugging Face form -> settings and memory-mapped tensors.

A directory with config.json and safetensors files, one or several with an index. Nothing in it is
run: no pickles, no code. What the settings mean for a GGUF file is decided in hf.py.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant import dequantize
from quant.ggml_types import GGMLType

MAX_JSON_BYTES = 64 << 20
_DTYPES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; str() is one line: the file, the field, what is wrong."""

    def __init__(self, path: Path, field: str, reason: str) -> None:
        line = f"{path}: {field}: {reason}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


@dataclass(frozen=True)
class Settings:
    """A JSON object; its getters name the file and the key when a value is missing or wrong.

    null counts as missing, as it does for the programs that write these files.
    """

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """The object in a JSON file; CheckpointError when there is none."""
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(path, "size", f"more than {MAX_JSON_BYTES} bytes")
        return cls(path, _json_object(path, path.read_bytes()))

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above 0 that a GGUF file can hold."""
        value = self._get(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self.wrong(key, f"wanted a whole number from 1 to {2**31 - 1}, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.wrong(key, f"wanted a number above 0, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, f"wanted true or false, got {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, f"wanted a string, got {value!r}")
        return value

    def section(self, key: str) -> "Settings":
        """An object inside this one; empty when it is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, f"wanted an object, got {value!r}")
        return Settings(self.path, value)

    def wrong(self, key: str, reason: str) -> CheckpointError:
        """The error to raise for a key; a long value is cut."""
        return CheckpointError(
            self.path, key, reason if len(reason) < 200 else reason[:197] + "..."
        )

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise self.wrong(key, "missing")
        return default if value is None else value


def _json_object(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object in which no key comes twice: readers differ in which of the two they take."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"two keys {key!r}")
        return values

    try:
        values = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, "JSON", str(error)) from error
    if not isinstance(values, dict):
        raise CheckpointError(path, "JSON", "not an object")
    return values


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file; `data` is its bytes, a view of the map."""

    path: Path
    name: str
    dtype: GGMLType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def read(self) -> NDArray[np.float32]:
        """The values, in `shape`; CheckpointError for NaN or infinity, which no model survives."""
        values = dequantize(self.data, self.dtype).reshape(self.shape)
        finite = np.isfinite(values)
        if not finite.all():
            where = np.argwhere(~finite)[0].tolist()
            raise CheckpointError(self.path, self.name, f"not a finite number at {where}")
        return values


class Checkpoint:
    """`config`, and `tensors` by name. Other files of the directory through `settings`, `file`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = Settings.read(self.file("config.json"))
        self.tensors = {tensor.name: tensor for tensor in self._read_tensors()}

    def file(self, name: str) -> Path:
        """A file of the directory by its plain name.

        A link may lead to the `blobs` of a Hugging Face cache, and nowhere else: names of files
        come from the checkpoint too.
        """
        path = self.directory / name
        if Path(name).name != name:
            raise CheckpointError(self.directory, name, "not the plain name of a file")
        if not path.is_file():
            raise CheckpointError(self.directory, name, "no such file")
        home = self.directory.resolve()
        if path.resolve().parent not in (home, home.parent.parent / "blobs"):
            raise CheckpointError(self.directory, name, "a link that leads out of the directory")
        return path

    def has_file(self, name: str) -> bool:
        return (self.directory / name).is_file()

    def settings(self, name: str) -> Settings:
        """An optional JSON file of the directory; empty when it is missing."""
        if self.has_file(name):
            return Settings.read(self.file(name))
        return Settings(self.directory / name, {})

    def _read_tensors(self) -> Iterator[StoredTensor]:
        """The tensors of every shard, each exactly where the index says."""
        if not self.has_file("model.safetensors.index.json"):
            if not self.has_file("model.safetensors"):
                raise CheckpointError(
                    self.directory,
                    "model.safetensors",
                    "no such file (weights are read from safetensors only: *.bin and *.pt can run "
                    "code when they are opened)",
                )
            yield from _read_shard(self.file("model.safetensors"))
            return
        index = Settings.read(self.file("model.safetensors.index.json"))
        places = index.section("weight_map").values
        if not places or not all(isinstance(shard, str) for shard in places.values()):
            raise index.wrong("weight_map", "wanted a file name for each tensor")
        found = set()
        for shard in sorted(set(places.values())):
            for tensor in _read_shard(self.file(shard)):
                if places.get(tensor.name) == shard:
                    found.add(tensor.name)
                    yield tensor
        for name in places.keys() - found:
            raise CheckpointError(self.directory / places[name], name, "no such tensor")


def _read_shard(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a safetensors file that `safetensors` itself accepts.

    It checks the header (sizes, shapes, no overlap, no hole, nothing behind the data) but has no
    NumPy type for BF16, so the bytes are mapped here.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise CheckpointError(path, "safetensors header", str(error)) from error
    raw = np.asarray(np.memmap(path, np.uint8, "r"))
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = _json_object(path, raw[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, info in header.items():
        if info["dtype"] not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise CheckpointError(path, name, f"type {info['dtype']}, only {known} are read")
        begin, end = info["data_offsets"]
        data = raw[start + begin : start + end]
        yield StoredTensor(path, name, _DTYPES[info["dtype"]], tuple(info["shape"]), data)
