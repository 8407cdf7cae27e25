"""`python -m mama` is `mama`."""

from mama.cli import main

main()
