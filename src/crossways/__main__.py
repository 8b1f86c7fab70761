"""`python -m crossways` is the `crossways` command."""

from crossways.cli import main

if __name__ == "__main__":
    main()
