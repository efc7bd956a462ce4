"""The roofline of a `bench` report: how fast memory and cores let a step be, and how fast it is.

A point is a kind of step: multiplications for each byte it reads (across) and each second (up).
Under the slope it waits for memory, under the flat roof for the cores.
"""

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cpuinfer.gguf_errors import escape


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG file, complete or not at all; OSError where it cannot be written."""
    bandwidth, compute = report["bandwidth_roof"]["median"], report["compute_roof"]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    found = points(report)
    ridge = compute / bandwidth
    across = [min([x for _, x, _ in found] + [ridge]) / 2, ridge]
    across.append(2 * max([x for _, x, _ in found] + [ridge]))
    axes.loglog(across, [bandwidth * across[0], compute, compute], color="black", linewidth=1)
    for name, x, y in found:
        axes.plot(x, y, "o", markersize=5)
        axes.annotate(name, (x, y), (4, -10), textcoords="offset points", fontsize=8)
    axes.set_title(
        f"{escape(Path(report['model']).name)}, {report['cpu']}, {report['threads']} threads: "
        f"{bandwidth:.1f} GB/s, {compute:.0f} GMAC/s",
        fontsize=9,
    )
    axes.set_xlabel("multiplications a byte read")
    axes.set_ylabel("GMAC/s")
    axes.grid(which="both", linewidth=0.3)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def points(report: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Label, multiplications a byte, GMAC/s of everything measured."""
    found = []
    for one in (*report["speed"], *report["rows"][1:], *report["sequences"][1:]):
        label = {
            "rows": f"{one['tokens']} rows",
            "sequences": f"{one['sequences']} sequences",
        }.get(one["name"], f"{one['name']} at {one['depth']}")
        found.append((label, one["macs_per_token"] / one["bytes_per_token"], one["gmacs"]))
    return found
