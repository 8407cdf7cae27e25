"""`python -m mama` is `mama`."""

from __future__ import annotations

from mama.runtime import preemption


def main() -> None:
    """The command line, which takes seconds to import: a signal meanwhile ends the process in one line."""
    preemption.end_early()
    from mama.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
