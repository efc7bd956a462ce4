"""JSON settings of a checkpoint, and the error that names what is wrong in one.

Nothing is believed of a value before a getter has looked at it.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20


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
        return cls(path, json_object(path, path.read_bytes()))

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


def json_object(path: Path, raw: bytes) -> dict[str, Any]:
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
