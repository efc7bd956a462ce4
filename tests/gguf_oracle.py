"""What gguf-py reads in a file, in a form to compare with what cpuinfer reads.

gguf-py does not validate: it is asked about files that cpuinfer accepts, never the other way.
"""

import math
from pathlib import Path

import gguf
import numpy as np

from cpuinfer import gguf_header
from cpuinfer.gguf import Value, open_gguf


def assert_read_the_same(path: Path) -> None:
    """Keys with type and value, tensors with shape, type, place and bytes: all as in gguf-py."""
    reader = gguf.GGUFReader(path)
    ours = open_gguf(path)
    fields = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    assert ours.version == reader.fields["GGUF.version"].parts[0][0]
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        assert same_value(ours.metadata[key], field), key
    assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
    header = gguf_header.parse_header(path.read_bytes(), path)
    for info, tensor in zip(header.tensors, reader.tensors, strict=True):
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.qtype == tensor.tensor_type
        assert header.data_start + info.offset == tensor.data_offset
        assert mine.data.tobytes() == tensor.data.tobytes()


def same_value(ours: Value, field: gguf.ReaderField) -> bool:
    """Whether a metadata value has the type and content that gguf-py found."""
    kind = field.types[0]
    if kind == gguf.GGUFValueType.STRING:
        return ours == bytes(field.parts[-1]).decode(errors="replace")
    if kind != gguf.GGUFValueType.ARRAY:
        theirs = field.parts[-1][0].item()
        if isinstance(ours, float) and math.isnan(ours):
            return math.isnan(theirs)
        return type(ours) is type(theirs) and ours == theirs
    parts = [field.parts[index] for index in field.data]
    # An array's element type is the part after the key's length and text and the value's type.
    element = gguf.GGUFValueType(field.parts[3][0])
    if element == gguf.GGUFValueType.STRING:
        return ours == [bytes(part) for part in parts]
    dtype = np.dtype(gguf.GGUFReader.gguf_scalar_to_np[element])
    content = b"".join(part.tobytes() for part in parts)
    return isinstance(ours, np.ndarray) and ours.dtype == dtype and ours.tobytes() == content
