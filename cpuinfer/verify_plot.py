"""The errors of a converted file: across, the layers; up, each kind of tensor's relative error."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cpuinfer.gguf_errors import escape
from quant.partial_file import complete_or_absent

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG file, complete or not at all; OSError where it cannot be written."""
    layers, others = series(report["verification"]["tensors"])
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for kind, points in layers.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=kind)
    for kind, error in others.items():
        axes.axhline(error, linestyle="--", linewidth=1, color="gray")
        axes.annotate(kind, (0, error), (2, 2), textcoords="offset points", fontsize=7)
    axes.set_title(
        f"{escape(Path(report['output']).name)}: {report['type']}, "
        f"{report['bits_per_weight']:.2f} bits a weight",
        fontsize=9,
    )
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error (root mean square)")
    axes.set_ylim(bottom=0)
    axes.grid(linewidth=0.3)
    if layers:
        axes.legend(fontsize=7)
    with complete_or_absent(path, 0) as place:
        figure.savefig(place, format="png")


def series(
    tensors: list[dict[str, Any]],
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, float]]:
    """Kind -> (layer, error) of the tensors of layers that have lost anything; name -> error of the
    others."""
    layers: dict[str, list[tuple[int, float]]] = defaultdict(list)
    others: dict[str, float] = {}
    for tensor in tensors:
        if not tensor["relative_error"]:
            continue
        found = _LAYER.fullmatch(tensor["name"])
        if found is None:
            others[tensor["name"].removesuffix(".weight")] = tensor["relative_error"]
        else:
            layers[found[2]].append((int(found[1]), tensor["relative_error"]))
    return layers, others
