"""`python -m kernelpress` is the command `kernelpress`."""

import sys

from kernelpress.cli import main

if __name__ == "__main__":
    sys.exit(main())
