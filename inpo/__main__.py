"""`python -m inpo`."""

import sys


def main() -> None:
    """The program. Its imports take seconds, in which nothing minds Ctrl-C yet."""
    try:
        from inpo.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
