"""`python -m moekern` and the `moekern` command."""

from moekern.cli import main

if __name__ == "__main__":
    main()
