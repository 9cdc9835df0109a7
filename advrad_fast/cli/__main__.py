"""``python -m advrad_fast.cli``, as ``torchrun -m`` calls it."""

import sys

from advrad_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
