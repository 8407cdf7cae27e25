"""Start a program with SIGTERM and SIGUSR2 blocked: `python blocked_signals.py PROGRAM [ARGUMENT]...`.

A job imports for seconds, on a slow file system for a minute, before submitit installs its handlers. A preemption
signal in that time would end the job as failed; blocked, it waits for the handlers. Standard library only, to start
fast.
"""

import os
import signal
import sys

SIGNALS = {signal.SIGTERM, signal.SIGUSR2}

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(sys.argv[1], sys.argv[1:])
