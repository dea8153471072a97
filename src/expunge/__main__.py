"""``python -m expunge`` is the console script."""

import sys

from expunge.cli import main

if __name__ == "__main__":
    sys.exit(main())
