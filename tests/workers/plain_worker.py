"""Runs a script as torchrun runs it, and gives torch's gloo a turn before Python ends.

Without it, one run in six aborts on leaving: see `_LAST_TURN_S` in trainingcompiler/rendezvous.py.
"""

import atexit
import runpy
import sys
import time

atexit.register(time.sleep, 0.05)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
