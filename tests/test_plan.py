"""What fits into the memory, and what is said where it does not, for the shape of Mistral 7B."""

from pathlib import Path

import mistral_shape
import pytest
from mistral_shape import POSITION, PUBLISHED
from test_machine import GIB, MEMINFO, group_v2, tree, v2

from cpuinfer import machine, plan
from cpuinfer.config import ModelConfig
from cpuinfer.machine import NotEnoughMemory
from quant.ggml_types import GGMLType

FILE = mistral_shape.file()
FULL = mistral_shape.config(None)
WINDOW = mistral_shape.config(4096)

#: Six blocks of activations for 256 tokens, their logits, and the program itself.
SCRATCH = 4 * 256 * (6 * 14336 + 32000) + (150 << 20)
WEIGHTS = PUBLISHED["Q4_0"]


def has(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: available)


def refusal(config: ModelConfig, kv_type: str, context_length: int | None) -> str:
    with pytest.raises(NotEnoughMemory) as caught:
        plan.fitting_context(FILE, config, kv_type, context_length)
    return str(caught.value)


def test_the_parts_of_a_plan() -> None:
    found = plan.memory_plan(FILE, WINDOW, "f16", 32768, adapters=1000)
    assert found.weights == WEIGHTS + 1000
    assert found.cache == (4096 + 255) * POSITION
    assert found.scratch == SCRATCH


def test_bytes_in_other_types_are_those_of_published_files() -> None:
    found = plan.type_bytes(FILE, FULL)
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED
    assert abs(found["Q2_K"] - 2.72e9) < 1e7
    assert list(found.values()) == sorted(found.values(), reverse=True)
    # Whatever the types of the file are that is asked.
    assert plan.type_bytes(mistral_shape.file(GGMLType.F16, GGMLType.F16), FULL) == found


@pytest.mark.parametrize(
    ("room", "longest"),
    [
        (32768 * POSITION, 32768),
        (32768 * POSITION - 1, 32768 - 256),
        (10_000 * POSITION, 9984),
        (512 * POSITION, 512),
        (512 * POSITION - 1, 0),
        (-1, 0),
    ],
)
def test_the_largest_context(room: int, longest: int) -> None:
    available = WEIGHTS + SCRATCH + room
    assert plan.largest_context(FILE, FULL, "f16", available) == longest
    assert plan.largest_context(FILE, FULL, "f16", available + 1000, adapters=1000) == longest


def test_a_ring_that_fits_fits_any_context() -> None:
    ring = WEIGHTS + SCRATCH + (4096 + 255) * POSITION
    assert plan.largest_context(FILE, WINDOW, "f16", ring) == 32768
    assert plan.largest_context(FILE, WINDOW, "f16", ring - 1) == 4096


def test_the_context_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, WEIGHTS + SCRATCH + 10_000 * POSITION)
    assert plan.fitting_context(FILE, FULL, "f16", None) == 9984
    assert plan.fitting_context(FILE, FULL, "f16", 10_000) == 10_000
    # 34 bytes for 32 numbers instead of 64
    assert plan.fitting_context(FILE, FULL, "q8_0", None) == 10_000 * 64 // 34 // 256 * 256
    with pytest.raises(ValueError, match="32769 is more than the 32768"):
        plan.fitting_context(FILE, FULL, "f16", 32769, force=True)


def test_forced_nothing_has_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, WEIGHTS + SCRATCH + 10_000 * POSITION)
    assert plan.fitting_context(FILE, FULL, "f16", None, force=True) == 9984
    assert plan.fitting_context(FILE, FULL, "f16", 32768, force=True) == 32768
    has(monkeypatch, 1 << 20)
    assert plan.fitting_context(FILE, FULL, "f16", None, force=True) == 512


def test_a_context_too_long_is_refused_with_those_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = group_v2("sys/fs/cgroup/app", str(7 * GIB), 2 * GIB, GIB // 2, GIB // 2)
    has(monkeypatch, machine.memory_available(tree(tmp_path, MEMINFO | v2("/app") | files)))
    room = 6 * GIB - WEIGHTS - SCRATCH
    longest = room // POSITION // 256 * 256
    small = room * 64 // 34 // POSITION // 256 * 256
    assert refusal(FULL, "f16", 32768) == (
        "not enough memory: 8.1 GiB needed (weights 3.8 GiB, cache 4.0 GiB, scratch 265.2 MiB), "
        f"6.0 GiB available; a context of {longest} positions fits, with a q8_0 cache one of "
        f"{small} (--force tries it all the same, and may swap)"
    )
    # A smaller cache is no advice where it is there already, and never for more than was asked.
    assert f"{small} positions fits (--force" in refusal(FULL, "q8_0", 32768)
    asked = longest + 300
    assert f"{longest} positions fits, with a q8_0 cache one of {asked} " in refusal(
        FULL, "f16", asked
    )


def test_weights_too_large_are_refused_with_the_types_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has(monkeypatch, PUBLISHED["Q3_K_M"] + SCRATCH + 4096 * POSITION)
    assert "; with 4096 positions it fits as Q3_K_M (3.3 GiB), Q2_K (2.5 GiB, slow) (" in refusal(
        FULL, "f16", None
    )
    has(monkeypatch, PUBLISHED["Q3_K_M"] + SCRATCH + 4096 * POSITION - 1)
    assert "; with 4096 positions it fits as Q2_K (" in refusal(FULL, "f16", None)
    has(monkeypatch, WEIGHTS + SCRATCH + 300 * POSITION)
    assert "; with a q8_0 cache a context of 512 fits (" in refusal(FULL, "f16", None)
    has(monkeypatch, 1 << 30)
    assert "; take a smaller model, or free some memory (" in refusal(FULL, "f16", None)


def test_other_types_are_for_the_context_that_is_wanted() -> None:
    def fitting(room: int, context_length: int | None) -> tuple[int, list[str]]:
        available = SCRATCH + room
        found = plan.alternatives(FILE, FULL, "f16", context_length, available)
        return found.positions, list(found.types)

    q3, q4 = PUBLISHED["Q3_K_M"], WEIGHTS
    assert fitting(q3 + 20_000 * POSITION, 20_000) == (20_000, ["Q3_K_M", "Q2_K"])
    assert fitting(q3 + 20_000 * POSITION - 1, 20_000) == (20_000, ["Q2_K"])
    assert fitting(q4 + 4096 * POSITION, None)[0] == 32768
    assert fitting(q4 + 4000 * POSITION, None) == (4096, ["Q3_K_M", "Q2_K"])
