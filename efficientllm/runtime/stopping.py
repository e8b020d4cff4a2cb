"""Signal handling: Ctrl-C or SIGTERM ends a command with one line and exit status 128 + signal, without a traceback."""

import functools
import os
import signal
import sys
import threading
import time
import typing

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_S = 0.02
PATIENCE_S = 2.0  # how long Python has to run its handler; XLA compiles for minutes without returning to Python
Main = typing.Callable[..., int]


def stoppable(main: Main) -> Main:
    """Decorator that makes a command's `main(argv)` return 130 or 143 when a signal stops it.

    Python runs a handler between two of its own instructions only. If none runs within `PATIENCE_S`, because a
    compiler holds the thread, the process ends at once. A handler that is installed later, such as the training
    loop's, takes precedence.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        if threading.current_thread() is not threading.main_thread():
            return main(argv)
        before = {signum: signal.signal(signum, _raise) for signum in SIGNALS}
        try:
            with _SignalWatcher():
                return main(argv)
        except KeyboardInterrupt as stop:
            return report_stop(stop)
        except Exception as error:
            if (cause := _cause(error)) is None:
                raise
            return report_stop(cause)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    return wrapped


def report_stop(stop: BaseException) -> int:
    """Prints which signal stopped a command and returns the exit status."""
    signum = signal.SIGTERM if stop.args else signal.SIGINT
    print(f"efficientllm: stopped by {signum.name}; the same command resumes", file=sys.stderr)
    # After a SIGINT inside an exec(), Python kills itself at exit even if it was caught. A new exec() clears that.
    exec("")
    return 128 + signum


def note_handled() -> None:
    """Records that Python handled a signal. Every handler that takes precedence over `_raise` must call it.

    Otherwise the process would be ended in the middle of what that handler starts, such as saving.
    """
    _SignalWatcher.handled_count += 1


def raise_if_stopped() -> None:
    """Raises KeyboardInterrupt if a signal's exception was lost, as in a callback or a destructor."""
    if _SignalWatcher.seen.is_set():
        _raise(_SignalWatcher.signum, None)


def _cause(error):
    """The KeyboardInterrupt behind an exception, or None. A C extension interrupted during its import wraps it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _raise(signum, _):
    note_handled()
    _SignalWatcher.signum = signum
    _SignalWatcher.seen.set()
    raise KeyboardInterrupt(*(["SIGTERM"] if signum == signal.SIGTERM else []))


class _SignalWatcher:
    """Thread that reads arriving signals, and ends the process if Python never gets to run `_raise`."""

    seen, signum, handled_count = threading.Event(), None, 0

    def __enter__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        _SignalWatcher.seen.clear()
        self._is_over, self._handled_before = False, _SignalWatcher.handled_count
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._is_over = True
        _SignalWatcher.seen.clear()
        signal.set_wakeup_fd(self._before)
        os.close(self._write)  # ends the thread, which closes the other end

    def _wait_until_handled(self, count):
        """Waits until Python has handled `count` signals or the command ends; False after PATIENCE_S."""
        end = time.monotonic() + PATIENCE_S
        while not self._is_over and _SignalWatcher.handled_count < self._handled_before + count:
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)
        return True

    def _watch(self):
        count = 0
        while number := os.read(self._read, 1):
            signum = signal.Signals(number[0])
            if signum not in SIGNALS or signal.getsignal(signum) is not _raise:
                continue
            count += 1
            if not self._wait_until_handled(count):
                print(f"efficientllm: stopped by {signum.name}; the same command resumes", file=sys.stderr, flush=True)
                os._exit(128 + signum)
        os.close(self._read)
