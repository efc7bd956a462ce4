"""The GGUF reader against files cut and mutated at random: it reads them or refuses them.

Nothing but ModelFormatError may come out, within 64 MiB of memory. What it reads of a mutated
file, gguf-py reads too, where gguf-py reads the file at all.
"""

import os
import resource
import secrets
from collections.abc import Iterator
from pathlib import Path
from random import Random

import gguf
import gguf_files as files
import pytest
from gguf_oracle import assert_read_the_same

from cpuinfer.gguf import ModelFormatError, open_gguf, parse
from cpuinfer.gguf_header import check_data, parse_header

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "models" / "stories260K.gguf"
PATH = Path("model.gguf")
MUTATIONS = 2_000

needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="shared/data is not here")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """64 MiB of address space more than now, for the length of a test."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    room = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (room, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def rng() -> Random:
    """Another seed each run; it is printed, and GGUF_FUZZ_SEED repeats it."""
    seed = int(os.environ.get("GGUF_FUZZ_SEED") or secrets.randbits(32))
    print(f"GGUF_FUZZ_SEED={seed}")
    return Random(seed)


def is_refused(raw: bytes) -> bool:
    try:
        parse(raw, PATH)
    except ModelFormatError as error:
        assert str(error).isprintable()
        return True
    return False


@needs_stories
def test_G25_stories_cut_at_every_byte(tmp_path: Path) -> None:
    raw = STORIES.read_bytes()
    reader = gguf.GGUFReader(STORIES)
    ends = [tensor.data_offset + tensor.n_bytes for tensor in reader.tensors]
    start, end = reader.data_offset, max(ends)
    for size in range(start):
        assert is_refused(raw[:size]), size
    # Beyond the header a cut changes only the size, which `check_data` alone looks at: a million
    # cuts without reading the header anew. The files cut below show that opening asks it.
    header = parse_header(raw, PATH)
    for size in range(start, end):
        try:
            check_data(header, PATH, size)
        except ModelFormatError as error:
            assert error.reason.endswith(f"{size} there, {end - size} missing")
        else:
            pytest.fail(f"read when cut at {size}")
    for size in range(end, len(raw) + 1):
        assert check_data(header, PATH, size) == 0
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw)
    for size in sorted({*range(start, end, 2_003), *(e - 1 for e in ends), end - 1}, reverse=True):
        os.truncate(path, size)
        with pytest.raises(ModelFormatError, match=f"{end - size} missing"):
            open_gguf(path)


@needs_stories
def test_G32_mutations_of_stories(rng: Random, little_memory: None, tmp_path: Path) -> None:
    read = fuzz(STORIES, MUTATIONS, rng, tmp_path, compare_every=8)
    assert MUTATIONS // 50 < read < MUTATIONS * 49 // 50  # neither side of the oracle is idle


def test_G32_mutations_of_a_file_with_every_type(
    rng: Random, little_memory: None, tmp_path: Path
) -> None:
    path = tmp_path / "seed.gguf"
    path.write_bytes(every_type())
    read = fuzz(path, MUTATIONS, rng, tmp_path, compare_every=4)
    assert MUTATIONS // 50 < read < MUTATIONS * 49 // 50


def fuzz(seed: Path, count: int, rng: Random, directory: Path, compare_every: int) -> int:
    """Reads `count` mutations of `seed`, compares every n-th accepted one; how many were read."""
    raw = seed.read_bytes()
    reader = gguf.GGUFReader(seed)
    places = list(number_fields(reader))
    header_end = reader.data_offset
    path = directory / "mutated.gguf"
    read = 0
    for _ in range(count):
        mutated = mutate(raw, header_end, places, rng)
        if is_refused(mutated):
            continue
        read += 1
        if read % compare_every == 0:
            path.write_bytes(mutated)
            compare_if_gguf_py_reads_it(path)
    return read


def compare_if_gguf_py_reads_it(path: Path) -> None:
    try:
        gguf.GGUFReader(path)
    except Exception:
        return
    assert_read_the_same(path)


def number_fields(reader: gguf.GGUFReader) -> Iterator[tuple[int, int]]:
    """Place and size of each number in the header, whether count, length, type or value."""
    fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
    for field in fields:
        place = field.offset
        for part in field.parts:
            if part.dtype.itemsize > 1 or part.size == 1:
                for index in range(part.size):
                    yield place + index * part.dtype.itemsize, part.dtype.itemsize
            place += part.nbytes


def mutate(raw: bytes, header_end: int, places: list[tuple[int, int]], rng: Random) -> bytes:
    """One to three faults: bits flipped, a stretch moved, a number of the header replaced."""
    mutated = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        # Most of them in the header; the data has nothing to check.
        size = header_end if rng.random() < 0.8 else len(mutated)
        kind = rng.randrange(3)
        if kind == 0:
            for _ in range(rng.randint(1, 4)):
                mutated[rng.randrange(min(size, len(mutated)))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            start, to, length = rng.randrange(size), rng.randrange(size), rng.randint(1, 64)
            overwritten = rng.choice((0, length, length))
            mutated[to : to + overwritten] = mutated[start : start + length]
        else:
            place, width = rng.choice(places)
            old = int.from_bytes(mutated[place : place + width], "little")
            special = (0, 1, 2, 31, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1, old - 1, old + 1)
            number = rng.choice(special) % 2 ** (8 * width)
            mutated[place : place + width] = number.to_bytes(width, "little")
    return bytes(mutated)


def every_type() -> bytes:
    """A small file with a value and an array of each type, and tensors of several types."""
    kinds = [*files.SCALARS, files.STRING]
    values = ["text" if kind == files.STRING else 1 for kind in kinds]
    keys = [files.key(f"value.{kind}", kind, v) for kind, v in zip(kinds, values, strict=True)]
    keys += [
        files.array_key(f"array.{kind}", kind, [v] * 3)
        for kind, v in zip(kinds, values, strict=True)
    ]
    keys.append(files.key("general.alignment", files.U32, 8))
    tensors = [
        files.tensor("scalar", []),
        files.tensor("f32", [3, 2, 2], 0, 8),
        files.tensor("q4_0", [64, 2], 2, 56),
        files.tensor("q6_k", [256], 14, 128),
        files.tensor("bf16", [5, 1, 1, 1], 30, 344),
    ]
    return files.gguf(keys, tensors, Random(0).randbytes(354), alignment=8)
