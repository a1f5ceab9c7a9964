"""`python -m dynmoe_ds` is `dynmoe`: what the launcher starts on every rank."""

import sys

from dynmoe_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
