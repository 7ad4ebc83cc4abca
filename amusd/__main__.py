"""Lets ``python -m amusd`` run the command line."""

from amusd.cli import main

if __name__ == "__main__":
    main()
