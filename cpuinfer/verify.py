"""The proof of a conversion: the written file is read back and held against its checkpoint.

Every tensor is dequantized and compared; the vocabulary splits texts and the template renders
conversations like the checkpoint's own (verify_text.py); the logits of a small model are those of a
plain float pass over the checkpoint's weights. Faults are what no rounding explains.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cpuinfer import verify_text
from cpuinfer.convert import Conversion, Plan
from cpuinfer.gguf import GGUFFile, QTensor, open_gguf
from cpuinfer.gguf_errors import ModelFormatError, escape
from cpuinfer.llm import LLM
from quant import dequantize, plain
from quant.compare import BOUNDS, Errors, errors

#: A model whose float pass over the checkpoint takes seconds.
SMALL = 300_000_000  # weights
_TOKENS = 40  # of the prompt whose logits are compared
# The largest error of logits, relative to their spread, that rounding of weights explains; logits
# that have nothing to do with each other differ by 1.4 times their spread.
_LOGITS_BOUNDS = {"F32": 1e-4, "F16": 0.05, "BF16": 0.1}
_LOGITS_BOUND = 1.0

Report = dict[str, Any]
OnProgress = Callable[[str, int, int], None]


class Unproven(Exception):
    """The file is not what the checkpoint is; str() is one line that says in what."""


def examine(plan: Plan, path: Path, threads: int, on_progress: OnProgress) -> Report:
    """What a written file is to its checkpoint, as a document. `on_progress("verify", bytes read,
    of how many)`. OSError, MemoryError, ModelFormatError and CheckpointError as they come."""
    start = time.monotonic()
    file = open_gguf(path)
    tensors = _tensors(plan, file, threads, on_progress)
    finite = not any(tensor["not_finite"] for tensor in tensors)
    report: Report = {
        "tensors": tensors,
        "vocabulary": verify_text.vocabulary(plan.source, file),
        "template": verify_text.template(plan.source, file),
        "logits": _logits(plan, path, threads) if finite else {"skipped": "weights are no numbers"},
    }
    report["faults"] = list(_faults(plan, report))
    return report | {"seconds": time.monotonic() - start}


def check(report: Report) -> None:
    """Unproven where there are faults."""
    if faults := report["faults"]:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise Unproven(f"{faults[0]}{more}; --no-verify would write the file all the same")


def text(report: Report) -> Iterator[str]:
    """The document for people: the tensors by type, and a line for everything else."""
    kinds = defaultdict(list)
    for tensor in report["tensors"]:
        kinds[tensor["type"]].append(tensor)
    for name, tensors in kinds.items():
        worst = max(tensors, key=lambda tensor: tensor["relative_error"])
        largest = max(tensor["max_error"] for tensor in tensors)
        yield (
            f"verified {len(tensors)} {name}: relative error {worst['relative_error']:.2g} at most "
            f"({escape(worst['name'])}), largest {largest:.2g}"
        )
    for subject in ("vocabulary", "template", "logits"):
        yield f"{subject}: {_sentence(subject, report[subject])}"
    yield f"verified in {report['seconds']:.1f} s"


def _sentence(subject: str, found: Report) -> str:
    if "skipped" in found:
        return f"not compared, {found['skipped']}"
    if subject == "logits":
        return (
            f"relative error {found['relative_error']:.2g}, largest {found['max_error']:.2g}, the "
            f"same likeliest token {found['same_argmax']} times of {found['tokens']}"
        )
    what = "texts split and joined" if subject == "vocabulary" else "conversations rendered"
    return f"{found['compared'] - len(found['differ'])} of {found['compared']} {what} alike"


def _tensors(
    plan: Plan, file: GGUFFile, threads: int, on_progress: OnProgress
) -> list[dict[str, Any]]:
    """Name, type and errors of each tensor."""
    total = sum(conversion.nbytes for conversion in plan.conversions)
    done, found = 0, []
    with ThreadPoolExecutor(threads) as pool:
        for conversion in plan.conversions:
            on_progress("verify", done, total)
            tensor = _same_tensor(file, conversion)
            sums = sum(pool.map(_Comparison(conversion, tensor), conversion.parts), Errors())
            tensor.release()
            done += conversion.nbytes
            found.append(
                {
                    "name": tensor.name,
                    "type": tensor.qtype.name,
                    "relative_error": sums.relative,
                    "max_error": sums.max_error,
                    "not_finite": sums.n_bad,
                }
            )
    return found


def _same_tensor(file: GGUFFile, conversion: Conversion) -> QTensor:
    """The tensor as it was written; ModelFormatError where it is another one."""
    wanted = conversion.tensor
    tensor = file.tensors.get(wanted.name)
    if tensor is None or (tensor.shape, tensor.qtype) != (wanted.shape, conversion.target):
        raise file.error(wanted.name, "it is not there as it was written")
    return tensor


class _Comparison:
    """Rows of a tensor -> their errors."""

    def __init__(self, conversion: Conversion, tensor: QTensor) -> None:
        self._source = conversion.tensor
        self._tensor = tensor

    def __call__(self, rows: tuple[int, int]) -> Errors:
        written = dequantize(self._tensor.data[slice(*rows)], self._tensor.qtype)
        return errors(self._source.rows(*rows), written)


def _logits(plan: Plan, path: Path, threads: int) -> Report:
    """The engine's logits against a plain pass over the checkpoint, where that is quick."""
    n_weights = sum(int(np.prod(c.tensor.shape)) for c in plan.conversions)
    if n_weights > SMALL:
        return {"skipped": f"only models of up to {SMALL / 1e6:.0f} million weights are"}
    if plan.source.sizes.n_experts:
        return {"skipped": "cpuinfer does not run mixtures of experts yet"}
    length = min(_TOKENS, plan.source.sizes.context_length)
    try:
        with LLM(path, length, threads, kv_type="f32", speculation=False) as llm:
            ids = llm.tokenizer.encode(verify_text.PROSE)[:length]
            found = llm.logits(ids).astype(np.float64)
    except ModelFormatError as error:
        return {"skipped": error.reason}
    want = plain.logits(plan.source, ids)
    difference = found - want
    return {
        "tokens": len(ids),
        "relative_error": float(np.sqrt(np.mean(difference**2)) / max(want.std(), 1e-30)),
        "max_error": float(np.abs(difference).max()),
        "same_argmax": int(np.sum(found.argmax(axis=1) == want.argmax(axis=1))),
    }


def _faults(plan: Plan, report: Report) -> Iterator[str]:
    """What is wrong, one line each, the plainest first."""
    bounds = {qtype.name: bound for qtype, bound in BOUNDS.items()}
    for tensor in report["tensors"]:
        if tensor["not_finite"]:
            yield f"{tensor['name']}: {tensor['not_finite']} values are no finite numbers"
        if tensor["relative_error"] > bounds[tensor["type"]]:
            yield (
                f"{tensor['name']}: relative error {tensor['relative_error']:.3g}, more than "
                f"{tensor['type']} explains ({bounds[tensor['type']]:g})"
            )
    for subject in ("vocabulary", "template"):
        for example in report[subject].get("differ", [])[:1]:
            yield f"{subject}: {example}"
    logits = report["logits"]
    bound = max(_LOGITS_BOUNDS.get(c.target.name, _LOGITS_BOUND) for c in plan.conversions)
    if logits.get("relative_error", 0.0) > bound:
        yield (
            f"logits: relative error {logits['relative_error']:.3g}, more than the types explain "
            f"({bound:g})"
        )
