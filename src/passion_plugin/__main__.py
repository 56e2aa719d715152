"""What ``python -m passion_plugin`` runs; see :mod:`passion_plugin.cli`."""

import sys

from passion_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
