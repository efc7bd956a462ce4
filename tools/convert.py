"""Make a GGUF file of published weights: `cpuinfer convert`, as a script."""

import sys
from collections.abc import Sequence

from cpuinfer import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command line, without the command's name."""
    return cli.main(["convert", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
