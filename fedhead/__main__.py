"""`python -m fedhead` is the command `fedhead`."""

from fedhead.cli import main

if __name__ == "__main__":
    main()
