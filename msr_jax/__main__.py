"""`python -m msr_jax` is `msr`."""

import sys

from msr_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
