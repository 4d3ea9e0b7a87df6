"""`python -m tempo`, the same as `tempo`."""

from tempo.cli import main

if __name__ == "__main__":
    main()
