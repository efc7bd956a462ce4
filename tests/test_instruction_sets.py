"""Every instruction set of this machine passes the kernels' tests, and all compute the same bits.

A set is chosen for a process, by CPUINFER_ISA; so each has its processes here.
"""

import subprocess
from collections.abc import Iterator

import pytest
from conftest import run_python, start_python

from cpuinfer import machine

SETS = machine.supported_instruction_sets()

LOGITS = """
import hashlib, tempfile
from dataclasses import replace
from conftest import *
from cpuinfer.kernels.jit import ISA
from cpuinfer.models.llama import Span

WIDE = replace(TINY, dim=256, hidden_dim=512, head_dim=64, rope_dim=64, sliding_window=24)
ids = np.random.default_rng(0).integers(0, WIDE.vocab_size, 60).astype(np.int32)
print(ISA)
for qtype, output, kv_type in (
    ("Q4_0", "Q6_K", "f16"),
    ("Q4_0", "Q6_K", "f32"),
    ("Q8_0", "Q8_0", "f16"),
    ("Q4_1", "Q5_0", "f16"),
    ("Q5_1", "Q3_K", "f16"),
    ("Q4_K", "Q5_K", "f16"),
    ("Q4_0", "Q6_K", "q8_0"),
    ("F16", "F32", "f16"),
    ("BF16", "BF16", "f32"),
):
    tensors = llama_tensors(WIDE, GGMLType[qtype], GGMLType[output])
    with tempfile.TemporaryDirectory() as directory:
        model = load_llama(Path(directory) / "model.gguf", WIDE, tensors, kv_type, threads=2)
    cache = model.make_cache()
    parts = [model.forward([Span(part, cache, len(part))]) for part in np.split(ids, [13, 46])]
    logits = np.concatenate(parts)
    assert np.isfinite(logits).all() and logits.std() > 0.1
    print(qtype, output, kv_type, hashlib.sha256(logits.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def kernel_tests() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """test_kernels.py under way for all sets but the best, which this process itself tests."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_kernels.py")
    children = {isa: start_python(*command, CPUINFER_ISA=isa) for isa in SETS[1:]}
    yield children
    for child in children.values():
        child.kill()
        child.communicate()


@pytest.mark.parametrize("isa", SETS[1:])
def test_kernels(isa: str, kernel_tests: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = kernel_tests[isa].communicate(timeout=900)
    assert kernel_tests[isa].returncode == 0, output


def test_all_sets_compute_the_same_bits(
    kernel_tests: dict[str, subprocess.Popen[str]],
) -> None:
    """Attention and the norms in single precision included."""
    found = {}
    for isa in SETS:
        used, *found[isa] = run_python(LOGITS, CPUINFER_ISA=isa).splitlines()
        assert used == isa
        assert len(found[isa]) == 9
    assert all(lines == found[SETS[0]] for lines in found.values()), found


def test_an_unknown_set_is_refused_by_name() -> None:
    with start_python("-c", "import cpuinfer.ops", CPUINFER_ISA="sse9") as child:
        output, _ = child.communicate(timeout=60)
    assert child.returncode != 0
    assert f"CPUINFER_ISA is 'sse9', this CPU runs: {', '.join(SETS)}" in output
