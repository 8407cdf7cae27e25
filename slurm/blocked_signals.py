"""Start a program with signals held back: `python held_back.py PROGRAM [ARGUMENT]...`. Only the standard library.

A job imports for seconds, on a slow file system for a minute, before submitit's handlers stand, and a signal
that says "save, you will be put back in the queue" would end it as failed. Held back, it waits for them.
"""

import os
import signal
import sys

SIGNALS = {signal.SIGTERM, signal.SIGUSR2}

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(sys.argv[1], sys.argv[1:])
