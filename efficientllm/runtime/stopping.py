"""Ctrl-C and SIGTERM at any moment of a command: one line and the exit status 128 + signal, no traceback."""

import functools
import os
import signal
import sys
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_S = 0.02
PATIENCE_S = 2.0  # for Python to get its turn: a compiler runs for minutes without


def stoppable(main):
    """Decorates a command's `main(argv)`, which then returns 130 or 143 where it is stopped.

    Python sees a signal between two of its own instructions only. While a compiler runs there are none, and after
    `PATIENCE_S` the process ends at once. Where others listen, as the training loop does, nothing is done here.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        if threading.current_thread() is not threading.main_thread():
            return main(argv)
        before = {signum: signal.signal(signum, _raise) for signum in SIGNALS}
        try:
            with _Watch():
                return main(argv)
        except KeyboardInterrupt as stop:
            return said(stop)
        except Exception as error:
            if (cause := _cause(error)) is None:
                raise
            return said(cause)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    return wrapped


def said(stop):
    """Prints why a command stopped -> its exit status."""
    signum = signal.SIGTERM if stop.args else signal.SIGINT
    print(f"efficientllm: stopped by {signum.name}; the same command goes on", file=sys.stderr)
    exec("")  # Python ends by SIGINT after one that came inside an exec, caught or not, until the next exec begins
    return 128 + signum


def heard():
    """Tells that Python had its turn for a signal that came: called by every handler that stands before `_raise`, so
    that the process is not ended in the middle of what that handler's owner does next, such as saving."""
    _Watch.heard += 1


def check():
    """Raises KeyboardInterrupt if a signal came whose exception was lost, as in a callback or a destructor."""
    if _Watch.seen.is_set():
        _raise(_Watch.signum, None)


def _cause(error):
    """The KeyboardInterrupt that an exception was made of, as by a C extension in the middle of its import, or None."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _raise(signum, _):
    heard()
    _Watch.signum = signum
    _Watch.seen.set()
    raise KeyboardInterrupt(*(["SIGTERM"] if signum == signal.SIGTERM else []))


class _Watch:
    """A thread that reads which signals came, and ends the process if Python never gets to `_raise`."""

    seen, signum, heard = threading.Event(), None, 0

    def __enter__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        _Watch.seen.clear()
        self._over, self._heard = False, _Watch.heard
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._over = True
        _Watch.seen.clear()
        signal.set_wakeup_fd(self._before)
        os.close(self._write)  # ends the thread, which closes the other end

    def _is_heard(self, count):
        """Whether Python comes to the handler of as many signals before PATIENCE_S are over, or the command ends."""
        end = time.monotonic() + PATIENCE_S
        while not self._over and _Watch.heard < self._heard + count:
            if time.monotonic() > end:
                return False
            time.sleep(LOOK_S)
        return True

    def _look(self):
        came = 0
        while number := os.read(self._read, 1):
            signum = signal.Signals(number[0])
            if signum not in SIGNALS or signal.getsignal(signum) is not _raise:
                continue
            came += 1
            if not self._is_heard(came):
                print(f"efficientllm: stopped by {signum.name}; the same command goes on", file=sys.stderr, flush=True)
                os._exit(128 + signum)
        os.close(self._read)
