"""Signals to a command: what the first and the second do in each phase, inside native calls and callbacks too; and standard streams
that are closed or lose their reader."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llavamed_jax.utils import signals

ROOT = Path(__file__).resolve().parents[2]
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

# A command whose program begins a phase, says so, and does something.
COMMAND = """
import gc, hashlib, os, sys, time
from llavamed_jax.cli import common
from llavamed_jax.utils import signals

def begin(*phase, **more):
    signals.enter(signals.Phase(*phase, **more))
    print("begun", flush=True)

def program(argv):
    signals.watch()
{body}

common.command(lambda: program)
"""
NATIVE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)  # minutes in which Python's own handlers do not run"


_STARTED = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while _STARTED:
        _STARTED.pop().kill()


def start(body, **options):
    code = COMMAND.format(body="\n".join("    " + line for line in body.splitlines()))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    _STARTED.append(process)
    assert process.stdout.readline() == "begun\n", process.stderr.read()
    return process


def end(process, timeout=20):
    try:
        return process.communicate(timeout=timeout)[1].splitlines()
    finally:
        process.kill()


@pytest.mark.parametrize("number, work", [(INT, "time.sleep(60)"), (TERM, NATIVE), (HUP, "time.sleep(60)")])
def test_with_nothing_to_save_the_first_signal_ends_it(number, work):
    """In a native call too, and what was begun is taken back."""
    process = start(f"with signals.undone_by(lambda: os.write(1, b'taken back\\n')):\n"
                    f"    begin('error: ended by {{name}}', 7, grace=0)\n    {work}")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (7, "taken back\n", f"error: ended by {signal.Signals(number).name}\n")


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_the_first_signal_sets_a_flag_that_the_loop_reads(number):
    process = start("begin('', note='the step is saved')\nwhile not signals.is_asked(): time.sleep(0.01)\n"
                    "print('saved'); return 75")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (75, "saved\n", f"{signal.Signals(number).name}: the step is saved\n")


def test_a_second_signal_ends_what_does_not_read_the_flag():
    processes = {second: start(f"begin('error: ended by a second {{name}}', 3)\n{work}") for second, work in (
        (TERM, "while True: time.sleep(0.01)"), (HUP, "while True: time.sleep(0.01)"), (INT, NATIVE))}
    for process in processes.values():
        process.send_signal(TERM)
        process.send_signal(TERM)  # as `timeout` sends it, twice in a moment: one signal
    time.sleep(0.5)
    assert all(process.poll() is None for process in processes.values())
    time.sleep(0.7)  # a terminal that closes may send SIGHUP twice within a second
    for second, process in processes.items():
        process.send_signal(second)
    for second, process in processes.items():
        assert end(process) == [f"error: ended by a second {second.name}"] and process.returncode == 3


def test_what_stops_at_nothing_is_ended_when_its_grace_is_over():
    process = start(f"begin(lambda: '12 answers are kept', 75, grace=0.5, raises=True, last=lambda: os.write(1, b'told\\n'))\n{NATIVE}")
    begun = time.monotonic()
    process.send_signal(TERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (75, "told\n", "12 answers are kept\n") and 0.4 < time.monotonic() - begun < 10


def test_a_signal_inside_a_callback_of_the_garbage_collector_is_not_lost():
    """Where an exception would be swallowed: jax has a callback there. The flag is set, and `check` raises behind it."""
    process = start("gc.callbacks.append(lambda *_: time.sleep(0.3))\nbegin('', raises=True)\n"
                    "try:\n    while True:\n        gc.collect()\n        signals.check()\nexcept signals.Stopped as error:\n"
                    "    print(error); return 75")
    time.sleep(0.1)
    process.send_signal(INT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (75, "stopped by SIGINT\n", "")


def test_nohup_keeps_a_lost_terminal_from_stopping_it():
    body = "begin('', note='heard')\nfor _ in range(30):\n    time.sleep(0.01)\nreturn 0 if not signals.is_asked() else 75"
    process = start(body, preexec_fn=lambda: signal.signal(HUP, signal.SIG_IGN))
    process.send_signal(HUP)
    assert end(process) == [] and process.returncode == 0


def test_signals_to_a_command_that_is_done_change_nothing():
    body = "begin('')\nsignals.enter(signals.over(0))\nprint('done', flush=True)\ntime.sleep(0.3)"
    process = start(body)
    assert process.stdout.readline() == "done\n"
    process.send_signal(TERM)
    assert end(process) == [] and process.returncode == 0


def test_alone_a_function_raises_at_the_second_signal_and_leaves_the_handlers_as_they_were(monkeypatch):
    """As `fit` in somebody's own program."""
    before = [signal.getsignal(number) for number in signals.NUMBERS]
    with signals.listening(signals.Phase("", note="noted")):
        assert not signals.is_asked()
        signal.raise_signal(TERM)
        signal.raise_signal(TERM)
        assert signals.is_asked()
        now = time.monotonic()
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + 1.5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(TERM)
    assert [signal.getsignal(number) for number in signals.NUMBERS] == before and not signals.is_asked()


def test_another_thread_hears_nothing_and_breaks_nothing():
    found = []

    def work():
        with signals.listening(signals.Phase("", raises=True)):
            signals.check()
            found.append(signals.is_asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


# ---- standard streams


def test_a_reader_that_is_gone_asks_what_saves_to_stop_and_fails_what_does_not():
    for phase, wanted in (("''", "error: stdout cannot be written to: Broken pipe; saved"),
                          ("'', grace=0", "error: the output was closed before everything was written")):
        process = start(f"begin({phase})\nfrom llavamed_jax.errors import UserError\nfor _ in range(500):\n    print('step', flush=True)\n"
                        "    if signals.is_asked(): raise UserError(signals.failure() + '; saved')\n    time.sleep(0.01)")
        process.stdout.close()
        error = process.stderr.read()
        assert (process.wait(20), error) == (1, wanted + "\n")


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams_lead_nowhere_and_no_file_takes_their_number(tmp_path, closed):
    code = ("import sys\nfrom llavamed_jax.cli import common\ndef program(argv):\n    file = open('FILE', 'w')\n    print('out')\n"
            "    print('err', file=sys.stderr)\n    file.write(str(file.fileno())); file.close(); return 3\n"
            "common.command(lambda: program)")
    file = tmp_path / "file"
    shell = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, code.replace("FILE", str(file))], cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 3 and int(file.read_text()) > 2
    assert (done.stdout, done.stderr) == ("" if 1 in closed else "out\n", "" if 2 in closed else "err\n")


def test_a_full_disk_behind_stdout_is_one_sentence():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        code = "from llavamed_jax.cli import common\ncommon.command(lambda: lambda argv: print('x'))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: stdout cannot be written to: No space left on device\n")


def test_a_terminal_that_is_gone_takes_no_work_with_it():
    """Its signal ignored, as by nohup: what is printed goes nowhere, and the command comes to its end."""
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
    ours, theirs = pty.openpty()
    code = ("import sys, time\nfrom llavamed_jax.cli import common\ndef program(argv):\n    print('begun', flush=True)\n"
            "    time.sleep(0.3)\n    for _ in range(9):\n        print('out', flush=True)\n"
            "        print('err', file=sys.stderr, flush=True)\n    return 5\n"
            "common.command(lambda: program)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=theirs,
                               stdout=theirs, stderr=theirs, preexec_fn=lambda: signal.signal(HUP, signal.SIG_IGN))
    os.close(theirs)
    assert os.read(ours, 5) == b"begun"
    os.close(ours)
    assert process.wait(20) == 5
