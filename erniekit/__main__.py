"""`python -m erniekit` is the command `erniekit`."""

import sys

from erniekit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
