"""Signals at any moment of a command. The processes in these tests load neither torch nor the commands."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

START = """
import os, signal, sys, time
sys.argv[0] = "andromeda"  # the package does not load torch for the command
from pathlib import Path
from andromeda import files
from andromeda.cli import interrupts
interrupts._UNHEARD_SECONDS = interrupts._CLEAN_UP_SECONDS = 0.2

def me(number):
    os.kill(os.getpid(), number)
"""

STUCK = """
import ctypes

def stuck(seconds):
    "In C, where signals do not interrupt anything and Python does not run."
    mutex, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    end = time.time() + seconds
    library.pthread_mutex_timedlock(mutex, (ctypes.c_long * 2)(int(end), int(end % 1 * 1e9)))
"""


def run(program, *words, **options):
    """The exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(program), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        **options,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_commands_are_loaded(tmp_path, number):
    """`python -m andromeda` gets a signal in the middle of `import torch`, which would hide an exception."""
    (tmp_path / "torch.py").write_text(
        "import os, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(30)\n"
        "except BaseException:\n"
        "    raise ImportError('Could not import module')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "andromeda", "info"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.returncode == 128 + number
    assert done.stdout == "" and done.stderr == "\nandromeda: interrupted\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_the_block_in_which_it_comes_cleans_up(tmp_path, number):
    program = """
        interrupts.raise_in_commands()
        try:
            with files.whole_folder(sys.argv[1]) as folder:
                (folder / "half").write_text("")
                me(int(sys.argv[2]))
                time.sleep(30)
        except KeyboardInterrupt as error:
            assert interrupts.seen() and str(error) == signal.Signals(int(sys.argv[2])).name
            sys.exit(interrupts.exit_code(error))
    """
    assert run(program, tmp_path / "rows", int(number)) == (128 + number, "")
    assert list(tmp_path.iterdir()) == []


def test_the_end_after_the_clean_up():
    """Python itself would wait for the thread and for the clean-up of libraries."""
    program = """
        import atexit, threading
        threading.Thread(target=time.sleep, args=(30,)).start()
        atexit.register(print, "done", file=sys.stderr)
        interrupts.end(143)
    """
    assert run(program) == (143, "done\n")


def test_a_second_signal_does_not_wait_for_the_clean_up(tmp_path):
    program = """
        interrupts._CLEAN_UP_SECONDS = 60
        interrupts.raise_in_commands()
        with files.whole_folder(sys.argv[1]) as folder:
            try:
                me(signal.SIGTERM)
                time.sleep(30)
            finally:
                me(signal.SIGINT)
                time.sleep(30)
    """
    assert run(program, tmp_path / "rows") == (143, "\nandromeda: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_keeps_a_signal_to_itself(tmp_path):
    program = """
        interrupts.raise_in_commands()
        with files.whole_folder(sys.argv[1]) as folder:
            try:
                me(signal.SIGINT)
                time.sleep(30)
            except BaseException:
                time.sleep(30)
    """
    code, said = run(program, tmp_path / "rows")
    assert code == 130 and said.endswith("andromeda: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_library_that_does_not_let_python_run(tmp_path, number):
    program = STUCK + textwrap.dedent("""
        interrupts.raise_in_commands()
        import threading
        threading.Timer(0.1, me, (int(sys.argv[1]),)).start()
        with files.whole_folder(sys.argv[2]) as folder:
            stuck(30)
    """)
    code, _ = run(program, int(number), tmp_path / "rows")
    assert code == 128 + number and list(tmp_path.iterdir()) == []


def test_another_handler_may_take_its_time():
    """The handler of the training finishes the step and saves; a second signal has its usual effect."""
    program = """
        interrupts.raise_in_commands()

        def note(number, frame):
            signal.signal(number, previous)

        previous = signal.signal(signal.SIGINT, note)
        me(signal.SIGINT)
        time.sleep(0.9)
        assert not interrupts.seen()
        try:
            me(signal.SIGINT)
            time.sleep(30)
        except interrupts.Interrupted as error:
            sys.exit(interrupts.exit_code(error) + 1)
    """
    assert run(program) == (131, "")


@pytest.mark.parametrize("signals, code", [(1, 7), (2, 130)])
def test_a_long_step_of_the_training(signals, code):
    """The first signal takes effect before the step or at its end; a second one does not wait."""
    program = (
        STUCK
        + f"""
import threading
interrupts.raise_in_commands()
interrupts.be_patient()

def note(number, frame):
    signal.signal(number, previous)

previous = signal.signal(signal.SIGINT, note)
me(signal.SIGINT)  # `note` puts the handler of the commands back
if {signals} == 2:
    threading.Timer(0.1, me, (signal.SIGINT,)).start()
stuck(0.9 if {signals} == 1 else 30)
os._exit(7)
"""
    )
    assert run(program)[0] == code


def test_a_signal_for_a_forked_worker_is_no_signal_for_the_command():
    program = (
        STUCK
        + """
interrupts.raise_in_commands()
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, b"x")
    time.sleep(30)
    os._exit(0)
os.read(reading, 1)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
stuck(0.9)
sys.exit(7)
"""
    )
    assert run(program) == (7, "")


def test_before_the_handlers_are_there():
    """Python's own handler would print a traceback."""
    program = "import sys; sys.argv[0] = 'andromeda'; import andromeda, os; os.kill(os.getpid(), 2)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_signals_that_are_ignored_stay_so():
    """Under `nohup` SIGHUP is ignored."""
    program = """
        interrupts.leave_at_once()
        me(signal.SIGHUP)
        interrupts.raise_in_commands()
        me(signal.SIGHUP)
        sys.exit(7)
    """
    assert run(program, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) == (7, "")


def test_exit_codes_without_a_signal():
    from andromeda.cli import interrupts

    assert interrupts.exit_code() == interrupts.exit_code(KeyboardInterrupt()) == 130
    assert not interrupts.seen()
