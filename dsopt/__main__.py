"""`python -m dsopt` is the command `dsopt`."""

from dsopt.cli import main

if __name__ == "__main__":
    main()
