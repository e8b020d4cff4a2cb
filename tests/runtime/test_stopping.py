"""Signals at any moment of a command: one line, 128 + signal, and never a traceback."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from efficientllm.runtime import stopping

pytestmark = pytest.mark.quick

SIGNALS = pytest.mark.parametrize("signum", stopping.SIGNALS)


def stop(signum):
    os.kill(os.getpid(), signum)
    raise AssertionError("the signal came too late")


@SIGNALS
def test_a_signal_is_a_status_and_one_line(signum, capsys):
    before = signal.getsignal(signum)
    assert stopping.stoppable(lambda argv: stop(signum))() == 128 + signum
    assert capsys.readouterr().err == f"efficientllm: stopped by {signum.name}; the same command resumes\n"
    assert signal.getsignal(signum) is before


def test_what_a_library_makes_of_it_is_a_stop_too():
    def main(argv):
        try:
            stop(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("Encountered an error while initializing the extension") from error

    assert stopping.stoppable(main)() == 130


def test_one_that_was_lost_is_found_at_the_next_check():
    def main(argv):
        with contextlib.suppress(KeyboardInterrupt):
            stop(signal.SIGTERM)
        stopping.raise_if_stopped()
        raise AssertionError

    assert stopping.stoppable(main)() == 143
    stopping.raise_if_stopped()  # that of an earlier command is no longer one


def test_other_errors_and_threads_are_left_alone():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stopping.stoppable(main)()
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(stopping.stoppable(lambda argv: 7)()))
    thread.start()
    thread.join()
    assert statuses == [7]


@SIGNALS
@pytest.mark.parametrize(
    "work",
    [
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",  # as a compiler does: no Python for minutes
        "exec('while True: pass')",  # Python would end itself by SIGINT
    ],
    ids=["compiling", "exec"],
)
def test_stopped_while_python_has_no_turn(work, signum):
    code = f"""
        import hashlib, sys
        from efficientllm.runtime import stopping
        stopping.PATIENCE_S = 0.3
        @stopping.stoppable
        def main(argv):
            print("on", flush=True)
            {work}
        sys.exit(main())
    """
    argv, pipe = [sys.executable, "-c", textwrap.dedent(code)], subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert error == f"efficientllm: stopped by {signum.name}; the same command resumes\n"


SAVES = """
import os, signal, time
from efficientllm.runtime import stopping
from efficientllm.train import loop
stopping.PATIENCE_S = 0.3
@stopping.stoppable
def main(argv):
    with loop.catch_signals() as caught:
        os.kill(os.getpid(), signal.{name})
        time.sleep(1.5)  # saves
        print("saved", caught[0] == signal.{name}, flush=True)
main()
"""


@pytest.mark.slow
@SIGNALS
def test_a_run_that_saves_is_given_its_time(signum):
    """The training loop takes the signal and hands the next one back: it is not to be ended over the first."""
    done = subprocess.run([sys.executable, "-c", SAVES.format(name=signum.name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "saved True\n"), done.stderr
