"""A model and its adapters -> a model that needs none: `cpuinfer merge`.

Each matrix becomes floats, gains B A and is quantized again; what no adapter adds to stays as it
is, byte for byte, where the type stays the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

from cpuinfer.gguf import GGUFFile
from cpuinfer.lora import Adapter, Floats, combined, packed
from cpuinfer.ops import linear
from cpuinfer.requantize import Conversion, Plan, plan, raw_metadata
from cpuinfer.team import computing
from cpuinfer.weights import Weight
from quant.mixes import Wishes


def plan_merge(file: GGUFFile, adapters: Sequence[Adapter], mix_name: str | None = None) -> Plan:
    """What `requantize.run` has to do; without the name of a mix tensors keep their types."""
    if mix_name is None:
        own = (Conversion(tensor, tensor.qtype, None) for tensor in file.tensors.values())
        planned = Plan(file, raw_metadata(file), tuple(own), ())
    else:
        planned = plan(file, mix_name, Wishes(), allow_requantize=True)

    # One tensor is worked on at a time; the factors of all of them can be large.
    factors = lru_cache(maxsize=1)(partial(_factors, adapters))

    def added(name: str, rows: slice) -> Floats:
        # Not NumPy's product: its library's threads and those that quantize slow each other down
        # tenfold.
        with computing(1):
            a, b = factors(name)
            return linear(b[rows], a)[0]

    changed = {name for adapter in adapters for name in adapter.names}
    conversions = tuple(
        replace(conversion, added=partial(added, conversion.tensor.name))
        if conversion.tensor.name in changed
        else conversion
        for conversion in planned.conversions
    )
    return replace(planned, conversions=conversions)


def _factors(adapters: Sequence[Adapter], name: str) -> tuple[Weight, Floats]:
    """A packed by columns, and B: `linear(B, A)` is what the matrix gains."""
    found = combined(adapters, name)
    assert found is not None
    a, b = found
    return packed(name, a.T), b
