"""For all tests."""

import signal

# Shells start background jobs with SIGINT ignored, nohup ignores SIGHUP, and children inherit that: tests of both would
# wait in vain.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
