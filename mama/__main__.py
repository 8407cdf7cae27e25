"""`python -m mama` is `mama`."""

from __future__ import annotations

from mama.runtime import preemption


def main() -> None:
    """Run the command line. Importing it takes a while: a signal meanwhile ends the process with one line."""
    preemption.exit_on_signals()
    from mama.cli.main import main as run  # slow, hence after the handlers

    run()


if __name__ == "__main__":
    main()
