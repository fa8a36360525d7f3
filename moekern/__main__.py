"""`python -m moekern` and the `moekern` command."""

from moekern.cli.app import main

if __name__ == "__main__":
    main()
