"""Kernels that are compiled already."""

from command import PROMPT, child


def test_kernels_are_loaded_without_what_compiles_them() -> None:
    """Numba imports strings, dictionaries and random numbers when it makes its compiler ready, a
    tenth of a second and more."""
    told = (
        "import atexit, sys; atexit.register(lambda: print('numba.cpython.unicode' in sys.modules))"
    )
    done = child("generate", "-p", PROMPT, "-n", "2", first=told)
    assert done.returncode == 0 and done.stdout.endswith(b"\nFalse\n")
