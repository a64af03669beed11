"""`python -m inpo`."""

import sys

if __name__ == "__main__":
    try:
        from inpo.cli import main

        main()
    except KeyboardInterrupt:  # before a command minds it
        sys.exit(130)
