"""`python -m inpo`."""

from inpo.cli import main

if __name__ == "__main__":
    main()
