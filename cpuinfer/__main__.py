"""`python -m cpuinfer` is the command `cpuinfer`."""

import sys

from cpuinfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
