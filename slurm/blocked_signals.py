"""Start a program with SIGTERM and SIGUSR2 blocked: `python blocked_signals.py PROGRAM [ARGUMENT]...`.

A job imports for seconds, on a slow file system for a minute, before submitit installs its handlers. A preemption
signal in that time would end the job as failed; blocked, it waits for the handlers. Standard library only, to start
fast.

submitit's handler of SIGTERM would forget the signal; `note`, in its place, keeps it for a call that handles it later.
"""

import os
import signal
import sys

SIGNALS = {signal.SIGTERM, signal.SIGUSR2}

noted: set[int] = set()  # that came before the call had handlers of its own


def note(number: int, frame: object) -> None:
    """A signal handler."""
    noted.add(number)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(sys.argv[1], sys.argv[1:])
