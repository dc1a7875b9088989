"""`python -m opsctl`."""

from opsctl.cli import main

if __name__ == "__main__":
    main()
