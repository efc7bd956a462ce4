"""What `cpuinfer inspect` says of a model file: as a document for programs and as text for people.

The file need not be one that runs here: a vocabulary alone or another architecture is described
too, with the reason why it does not run. Text from the file is printed escaped; keys and the names
of tensors are printable, or the file would have been refused.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from cpuinfer import estimate, machine
from cpuinfer.config import ModelConfig, SlidingWindow
from cpuinfer.gguf import GGUFFile, ModelFormatError, QTensor, Value, escape
from cpuinfer.loading import file_warnings
from cpuinfer.plan import (
    Alternatives,
    alternatives,
    check_context,
    largest_context,
    memory_plan,
    type_bytes,
)
from cpuinfer.tokenizer import load_tokenizer

Report = dict[str, Any]

_SHOWN_ELEMENTS = 6
_SHOWN_CHARACTERS = 60


def describe(
    file: GGUFFile,
    context_length: int | None = None,
    sliding_window: SlidingWindow = "auto",
    *,
    kv_type: str,
) -> Report:
    """Everything about a file that JSON can hold; memory for this context, or the trained one.

    ValueError for a context or a window that cannot be.
    """
    return {
        "version": file.version,
        "bytes": file.nbytes,
        "architecture": plain(file.metadata.get("general.architecture")),
        "name": plain(file.metadata.get("general.name")),
        "parameters": sum(_count(tensor) for tensor in file.tensors.values()),
        "kinds": _grouped(file.tensors.values()),
        "metadata": {key: plain(value) for key, value in file.metadata.items()},
        "tensors": [_tensor(tensor) for tensor in file.tensors.values()],
        **fit(file, context_length, sliding_window, kv_type=kv_type),
    }


def fit(
    file: GGUFFile,
    context_length: int | None = None,
    sliding_window: SlidingWindow = "auto",
    *,
    kv_type: str,
) -> Report:
    """Of what `describe` says whether a file runs here, what memory it takes and how fast it is."""
    report: Report = {
        "path": str(file.path),
        "runs": False,
        "reason": None,
        "config": None,
        "memory": None,
        "speed": None,
        "warnings": list(file.warnings),
    }
    try:
        config = ModelConfig.from_gguf(file, sliding_window)
        report["config"] = asdict(config)
        report["warnings"] = file_warnings(file, config)
        load_tokenizer(file)
    except ModelFormatError as error:
        report["reason"] = f"{error.field}: {error.reason}"
    else:
        report["runs"] = True
        if context_length is not None:
            check_context(config, context_length)
        report["memory"] = memory = _memory(file, config, kv_type, context_length)
        report["speed"] = _speed(file, config, kv_type, memory)
    return report


def plain(value: Any) -> Any:
    """A metadata value (or anything made of such) for JSON: arrays as lists, bytes as text, and
    null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def text(file: GGUFFile, report: Report, list_tensors: bool) -> Iterator[str]:
    """The lines of a report for people."""
    yield from _columns(_summary(file, report))
    if report["kinds"]:
        yield ""
        yield from _columns(_kind_rows(report["kinds"]), right=(2, 3, 4))
    yield ""
    yield from _columns((key, _shown(value)) for key, value in file.metadata.items())
    if list_tensors:
        yield ""
        rows = [
            (t["name"], t["type"], _sizes(t["shape"]), machine.format_bytes(t["bytes"]))
            for t in report["tensors"]
        ]
        yield from _columns([("tensor", "type", "shape", "size"), *rows], right=(3,))


# The document


def _count(tensor: QTensor) -> int:
    return math.prod(tensor.shape)


def _tensor(tensor: QTensor) -> Report:
    return {
        "name": tensor.name,
        "type": tensor.qtype.name,
        "shape": list(tensor.shape),
        "bytes": tensor.data.nbytes,
    }


def _grouped(tensors: Iterable[QTensor]) -> list[Report]:
    """Tensors of one kind (the same name but for the layer) and type together."""
    groups: dict[tuple[str, str], Report] = {}
    for tensor in tensors:
        kind = re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name)
        group = groups.setdefault(
            (kind, tensor.qtype.name),
            {"kind": kind, "type": tensor.qtype.name, "tensors": 0, "parameters": 0, "bytes": 0},
        )
        group["tensors"] += 1
        group["parameters"] += _count(tensor)
        group["bytes"] += tensor.data.nbytes
    return list(groups.values())


def _memory(
    file: GGUFFile, config: ModelConfig, kv_type: str, context_length: int | None
) -> Report:
    """What the model takes with this context, the context it would get if none were asked, what
    would fit instead, and the bytes of its file in other types."""
    available = machine.memory_available()
    wanted = context_length or config.context_length
    plan = memory_plan(file, config, kv_type, wanted)
    instead = None
    if plan.total > available:
        instead = asdict(alternatives(file, config, kv_type, context_length, available))
    return {
        "context_length": wanted,
        "sliding_window": config.sliding_window,
        "kv_type": kv_type,
        **asdict(plan),
        "total": plan.total,
        "available": available,
        "fitting_context_length": largest_context(file, config, kv_type, available),
        "instead": instead,
        "type_bytes": type_bytes(file, config),
    }


def _speed(file: GGUFFile, config: ModelConfig, kv_type: str, memory: Report) -> Report | None:
    """What to expect with the context of `memory`, or the one the model would get."""
    context_length = min(memory["context_length"], memory["fitting_context_length"])
    if not context_length:
        return None
    found = estimate.speed(file, config, kv_type, context_length, estimate.decode_threads())
    return None if found is None else asdict(found)


# The text


def _summary(file: GGUFFile, report: Report) -> Iterator[tuple[str, str]]:
    yield "file", escape(report["path"])
    yield "format", f"GGUF version {report['version']}, {len(file.tensors)} tensors"
    yield "size", f"{machine.format_bytes(report['bytes'])} ({report['bytes']:,} bytes)"
    if report["name"] is not None:
        yield "name", escape(str(report["name"]))
    yield "architecture", escape(str(report["architecture"] or "not named"))
    yield "parameters", _number(report["parameters"])
    if (config := report["config"]) is not None:
        heads = f"{config['n_heads']} heads of {config['head_dim']}"
        yield "layers", f"{config['n_layers']} of {config['dim']} values, {heads}"
        yield "vocabulary", f"{config['vocab_size']} tokens"
        window = config["sliding_window"]
        yield "context", f"{config['context_length']} positions as trained"
        yield "window", "none" if window is None else f"{window} positions in every layer"
    yield from _fit_facts(report)
    for warning in report["warnings"]:
        yield "warning", escape(warning)


def fit_facts(report: Report) -> Iterator[tuple[str, str]]:
    """What `fit` found, for people: names and facts."""
    yield "model", escape(report["path"])
    yield from _fit_facts(report)


def _fit_facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "runs here", "yes" if report["runs"] else f"no: {escape(report['reason'])}"
    if (memory := report["memory"]) is not None:
        parts = (f"{machine.format_bytes(memory[name])}" for name in _PARTS)
        named = ", ".join(f"{name} {size}" for name, size in zip(_PARTS, parts, strict=True))
        total, available = (machine.format_bytes(memory[key]) for key in ("total", "available"))
        enough = "too little" if memory["instead"] else "enough"
        yield "memory", f"{total} for {memory['context_length']} positions: {named}"
        yield "available", f"{available}, which is {enough}"
        if memory["instead"] is not None:
            for line in Alternatives(**memory["instead"]).lines():
                yield "instead", line
    if (speed := report["speed"]) is not None:
        threads, gbs = speed["threads"], speed["bandwidth"]
        yield "speed", f"{estimate.Speed(**speed)} ({gbs:.1f} GB/s read by {threads} threads)"


_PARTS = ("weights", "cache", "scratch")


def _kind_rows(kinds: list[Report]) -> Iterator[tuple[str, ...]]:
    yield "tensors", "type", "count", "parameters", "size"
    by_type: dict[str, Report] = {}
    for group in kinds:
        total = by_type.setdefault(group["type"], {"tensors": 0, "parameters": 0, "bytes": 0})
        for key in total:
            total[key] += group[key]
        yield group["kind"], *_amounts(group["type"], group)
    for qtype, total in by_type.items():
        yield "together", *_amounts(qtype, total)


def _amounts(qtype: str, group: Report) -> tuple[str, ...]:
    size = machine.format_bytes(group["bytes"])
    return qtype, str(group["tensors"]), f"{group['parameters']:,}", size


def _shown(value: Value) -> str:
    """A metadata value on one line: scalars whole, arrays by their first elements."""
    if isinstance(value, str):
        return escape(value)
    if not isinstance(value, list | np.ndarray):
        return json.dumps(value)
    some = [_element(item) for item in value[:_SHOWN_ELEMENTS]]
    rest = f", ... ({len(value)} in all)" if len(value) > len(some) else ""
    return f"[{', '.join(some)}{rest}]"


def _element(item: Any) -> str:
    if not isinstance(item, bytes):
        return f"{item:g}" if isinstance(item, np.floating) else str(item)
    shown = escape(item[:_SHOWN_CHARACTERS]) + "..." * (len(item) > _SHOWN_CHARACTERS)
    return f'"{shown}"'


def _number(count: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.2f} {unit} ({count:,})"
    return f"{count:,}"


def _sizes(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _columns(rows: Iterable[tuple[str, ...]], right: tuple[int, ...] = ()) -> Iterator[str]:
    """Rows of equal length under each other, the last column as long as it is."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
