"""`python -m mama` is `mama`."""

from __future__ import annotations

from mama import stop


def main() -> None:
    """The command line, which takes seconds to import: a signal meanwhile ends the process in one line."""
    stop.end_early()
    from mama.cli import main as run

    run()


if __name__ == "__main__":
    main()
