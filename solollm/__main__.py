"""`python -m solollm`, the same as `solollm`."""

import sys

from solollm.cli import main

if __name__ == "__main__":
    sys.exit(main())
