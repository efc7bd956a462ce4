"""What `cpuinfer quantize` is going to do, or has done, for programs and for people."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cpuinfer.gguf_errors import escape
from cpuinfer.importance import Importance
from cpuinfer.requantize import Plan
from quant import WEIGHTED


def report(plan: Plan, mix_name: str) -> dict[str, Any]:
    """Types and bytes, in all and of each tensor."""
    values = sum(math.prod(conversion.tensor.shape) for conversion in plan.conversions)
    before = sum(conversion.tensor.data.nbytes for conversion in plan.conversions)
    return {
        "input": str(plan.file.path),
        "type": mix_name,
        "bytes_before": before,
        "bytes": plan.nbytes,
        "bits_per_weight_before": 8 * before / max(1, values),
        "bits_per_weight": 8 * plan.nbytes / max(1, values),
        "tensors": [
            {
                "name": conversion.tensor.name,
                "shape": list(conversion.tensor.shape),
                "type_before": conversion.tensor.qtype.name,
                "type": conversion.target.name,
                "bytes_before": conversion.tensor.data.nbytes,
                "bytes": conversion.nbytes,
                "weighted": conversion.weights is not None,
            }
            for conversion in plan.conversions
        ],
    }


def warnings(plan: Plan, importance: Importance | None) -> Iterator[str]:
    """What a user may not expect."""
    if plan.fallbacks:
        yield (
            f"{len(plan.fallbacks)} tensors have rows that blocks do not divide and get another "
            f"type: {', '.join(plan.fallbacks[:3])}{', ...' * (len(plan.fallbacks) > 3)}"
        )
    if importance is not None:
        without = [
            conversion.tensor.name
            for conversion in plan.conversions
            if conversion.weights is None
            and conversion.target is not conversion.tensor.qtype
            and conversion.target in WEIGHTED
        ]
        if without:
            yield (
                f"{importance.path} says nothing of {len(without)} tensors: "
                f"{', '.join(without[:3])}{', ...' * (len(without) > 3)}"
            )


def text(report: dict[str, Any]) -> Iterator[str]:
    """The tensors where nothing was written; the sum of it."""
    tensors = report["tensors"]
    if "output" not in report:
        width = max((len(escape(tensor["name"])) for tensor in tensors), default=0)
        for tensor in tensors:
            shape = " x ".join(map(str, tensor["shape"]))
            kinds = f"{tensor['type_before']:>4} -> {tensor['type']:<4}"
            sizes = f"{tensor['bytes_before'] / 1e6:9.2f} -> {tensor['bytes'] / 1e6:9.2f} MB"
            yield f"{escape(tensor['name']):<{width}}  {shape:>15}  {kinds}  {sizes}"
    counts = Counter(tensor["type"] for tensor in tensors)
    yield ", ".join(f"{count} {name}" for name, count in counts.most_common())
    yield (
        f"{report['bytes_before'] / 1e9:.3f} GB, {report['bits_per_weight_before']:.2f} bits a "
        f"weight -> {report['bytes'] / 1e9:.3f} GB, {report['bits_per_weight']:.2f} bits"
    )
    if "output" in report:
        yield f"{report['output']}: {report['seconds']:.1f} s"
