"""Worker processes that die or give nothing: they are named, what was read last is said, and the run saves without them; and shared
memory that is too small for them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.checkpoints.tree.store import newest_intact_step
from llavamed_jax.pipeline import workers
from llavamed_jax.utils import signals
from tests.support import training_runs as runs
from tests.support import xla
from tests.support.numbered import Dying, Make
from tests.support.training_runs import ROOT

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux's /proc")


CLOSE_S = workers._CLOSE_S


def hurry(monkeypatch, give_up=0.3):
    """From now on, when processes have started."""
    monkeypatch.setattr(workers, "WARN_S", 0.1)
    monkeypatch.setattr(workers, "GIVE_UP_S", give_up)


def started(*arguments):
    """As a context: closed at its end, within seconds."""
    @contextlib.contextmanager
    def closing():
        with contextlib.closing(workers.in_order(*arguments)) as found:
            yield found
            begun = time.monotonic()
        assert time.monotonic() - begun < 2 * CLOSE_S
    return closing()


def process_of(found, worker):
    """The process of a worker, once it has begun: until then it is 0, and a signal to 0 reaches every process of the tests."""
    deadline = time.monotonic() + 60
    while not (pid := found._shared.note(worker)[0]):
        assert time.monotonic() < deadline, f"worker {worker} has not begun"
        time.sleep(0.01)
    return pid


def test_a_signal_does_not_lengthen_the_wait(slow_signal):
    with started(Make(hanging=[0]), 1, 0) as found:
        def on_wait(waited):
            if waited > 3 * workers._POLL_S:
                raise signals.Stopped("seen")

        found.on_wait = on_wait
        begun = time.monotonic()
        with pytest.raises(signals.Stopped, match="seen"):
            next(found)
        assert time.monotonic() - begun < 30


def test_a_worker_that_was_stopped_is_waited_for_and_may_go_on_and_one_that_was_killed_is_named(monkeypatch, capsys):
    with started(Make(), 10**6, 2) as found:
        assert next(found)["number"] == 0
        pid = process_of(found, 1)
        hurry(monkeypatch, give_up=60)
        os.kill(pid, signal.SIGSTOP)
        found.on_wait = lambda waited: waited > 0.3 and os.kill(pid, signal.SIGCONT)
        assert [next(found)["number"] for _ in range(20)] == list(range(1, 21))
        said = capsys.readouterr().err
        assert f"loader worker 1 of 2 (process {pid})" in said and "has returned nothing" in said
        found.on_wait = lambda waited: None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(workers.WorkerError) as caught:
            for _ in range(20):
                next(found)
    assert str(caught.value) == (f"loader worker 1 of 2 (process {pid}) was killed by SIGKILL, which the system sends "
                                 "when memory runs out; fewer data.workers or a smaller batch_size need less memory")


def test_a_worker_that_dies_before_its_first_result_is_named():
    with started(Dying(0), 10, 1) as found:
        with pytest.raises(workers.WorkerError, match=r"^loader worker 0 of 1 \(process \d+\) was killed by SIGSEGV$"):
            next(found)


def test_a_worker_that_only_grain_saw_end_is_named_by_its_turn(monkeypatch):
    monkeypatch.setattr(workers.worker_notes.Shared, "ended", lambda self: iter(()))  # it was gone before anybody looked
    with started(Dying(1), 10, 2) as found:
        with pytest.raises(workers.WorkerError, match=r"^loader worker 1 of 2 \(process \d+\) was killed by SIGSEGV$"):
            assert next(found)["number"] == 0
            next(found)


@pytest.mark.parametrize("count", [0, 2])
def test_who_gives_nothing_is_named_with_what_it_reads_and_given_up(monkeypatch, capsys, count):
    with started(Make(hanging=[5]), 9, count) as found:
        assert [next(found)["number"] for _ in range(5)] == [*range(5)]
        hurry(monkeypatch)
        with pytest.raises(workers.WorkerError) as caught:
            next(found)
    who = r"loader worker 1 of 2 \(process \d+\)" if count else "the loader"
    said = f"{who}, reading images/5.png, has returned nothing for 1 s"
    assert re.fullmatch(f"timeout: {said}", str(caught.value).replace("0 s", "1 s"))
    assert re.fullmatch(f"(warning: {said}; waiting up to 1 s more\n)+", capsys.readouterr().err.replace("0 s", "1 s"))


@pytest.mark.parametrize("count", [0, 1])
def test_a_stop_does_not_wait_for_what_does_not_come(count, monkeypatch):
    monkeypatch.setattr(workers, "_CLOSE_S", 0.2)  # a worker that has not begun is not known yet
    with started(Make(hanging=[0]), 9, count) as found:
        def stop(waited):
            if waited > 0.1:
                raise signals.Stopped("stopped")

        found.on_wait = stop
        begun = time.monotonic()
        with pytest.raises(signals.Stopped):
            next(found)
        assert time.monotonic() - begun < 5


def test_a_process_among_others_cannot_do_without_and_says_so():
    with started(Make(hanging=[0]), 9, 0) as found:
        def give_up(_):
            raise TimeoutError

        found.on_wait = give_up
        with pytest.raises(workers.WorkerError, match="^timeout: the loader(, reading images/0.png,)? has returned nothing for 0 s$"):
            next(found)


# ---- shared memory


PARENT = """
from llavamed_jax.pipeline import workers
if __name__ == "__main__":
    batches = workers.in_order(str, 10, 2)
    next(batches)
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not here")
def test_workers_that_are_stopped_before_their_first_line_end_with_their_parent(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    stopped, deadline = set(), time.monotonic() + 120
    while len(stopped) < 2 and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ProcessLookupError):  # a thread or a process that has just ended
            for file in Path(f"/proc/{parent.pid}/task").glob("*/children"):
                for pid in map(int, file.read_text().split()):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if pid not in stopped and words.startswith(os.fsencode(sys.executable)) and b"--multiprocessing-fork" in words:
                        os.kill(pid, signal.SIGSTOP)
                        stopped.add(pid)
        time.sleep(0.001)
    assert len(stopped) == 2
    assert not any(b"/numpy/" in Path(f"/proc/{pid}/maps").read_bytes() for pid in stopped), "they have begun"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in stopped if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


KILLED_AT_BIRTH = """
import os, signal, sys
from multiprocessing import get_context, shared_memory

from llavamed_jax.utils import child_processes

def begin():
    child_processes.SEGMENT = sys.argv[1]
    child_processes.register_shared_memory_first()
    os.ftruncate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # the segment is open, and Python has not registered it
    shared_memory.SharedMemory(create=True, size=40)

if __name__ == "__main__":
    child_processes.prepare()
    process = get_context("spawn").Process(target=begin)
    process.start()
    process.join()
    print(process.exitcode, *(name for name in os.listdir("/dev/shm") if name.startswith(sys.argv[1])))
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is no folder here")
def test_shared_memory_of_a_worker_that_is_killed_while_it_makes_it_is_removed(tmp_path):
    script, prefix = tmp_path / "program.py", f"lm{os.getpid()}k"
    script.write_text(KILLED_AT_BIRTH)
    found = subprocess.run([sys.executable, script, prefix], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    code, *segments = found.stdout.split()
    assert int(code) == -signal.SIGKILL and len(segments) == 1 and not found.stderr
    deadline = time.monotonic() + 30
    while (left := list(Path("/dev/shm").glob(f"{prefix}*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_workers_fit_the_room_that_is_there(tmp_path, monkeypatch):
    class Found:
        f_bavail, f_frsize = 64, 2**20

    monkeypatch.setattr(workers.os, "statvfs", lambda folder: Found)
    million = 2**20
    assert [workers.fitting(8, size * million) for size in (1, 2, 4, 7, 13, 43)] == [8, 7, 3, 2, 0, 0]
    assert workers.fitting(0, million) == 0
    monkeypatch.undo()
    assert workers.fitting(8, million, str(tmp_path / "absent")) == 8, "a system without it"


IN_A_CONTAINER = """
    import contextlib
    from llavamed_jax.pipeline import lengths, loader
    from llavamed_jax.datasets.training import TrainingData
    from llavamed_jax.pipeline.packing import Layout, Plan, Stream
    from llavamed_jax.processor import Processor
    from llavamed_jax.datasets.records import MemoryRecords
    from llavamed_jax.text.tokenizer import Tokenizer
    from llavamed_jax.pipeline.workers import WorkerError

    def batches_of(rows, asked):
        records = [{"id": i, "image": [IMAGE], "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}]}
                   for i in range(200)]
        data = TrainingData([MemoryRecords(records)])
        processor = Processor(None, Tokenizer.load(TOKENIZER), "v1.5:mistral_instruct", image_size=336)
        plan = Plan(Stream.of(data, 0), lengths.measure(data, processor, 640), Layout(640, 1, rows, False))
        batches = loader.batches(data, processor, plan, 640, num_workers=asked)
        for _ in range(2):
            assert next(batches)["pixel_values"].shape == (rows, 1, 336, 336, 3)
        print(rows, "rows")
        return batches

    def main():
        batches_of(48, 8).close()
        batches = batches_of(24, 8)
        try:
            for _ in range(25):
                with contextlib.suppress(OSError), open("/dev/shm/other", "ab", buffering=0) as file:
                    while file.write(b"x" * 2**12):  # by another program
                        pass
                next(batches)
        except WorkerError as error:
            print("error:", error)
        batches.close()
        print("done")

    if __name__ == "__main__":
        main()
"""


def test_in_a_small_container_fewer_workers_start_and_a_memory_that_another_program_fills_is_named(tmp_path, mistral_tokenizer):
    """With 64 MB of shared memory, Docker's default."""
    enter = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "-"]
    if shutil.which("unshare") is None or subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("another /dev/shm cannot be mounted here: that takes Linux and root")
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)  # small, as it is read some hundred times
    script = tmp_path / "program.py"
    code = textwrap.dedent(IN_A_CONTAINER).replace("IMAGE", repr(str(image))).replace("TOKENIZER", repr(str(mistral_tokenizer)))
    script.write_text(code)
    done = subprocess.run([*enter, sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=600)
    has = "because /dev/shm has 67 MB free and a worker needs"
    assert done.stderr.splitlines() == [
        f"warning: no data.workers are started (a thread makes the batches), {has} 67 MB for batches of 16.7 MB; "
        "docker run --shm-size=8g gives more",
        f"warning: only 1 of 8 data.workers are started, {has} 33 MB for batches of 8.4 MB; docker run --shm-size=8g gives more"]
    thread, worker, error, end = done.stdout.splitlines()
    assert (thread, worker, end) == ("48 rows", "24 rows", "done") and error.startswith("error: loader worker ")
    assert re.search(r"was killed by SIGBUS, which the system sends when /dev/shm is full \(\d+ MB are free now\); fewer data.workers need "
                     "less of it, and docker run --shm-size=8g gives more", error)


# ---- a run


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    keys = {"init": runs.write_start(folder / "start"), "total_steps": 100000, "batch_size": 4, "max_length": 40, "log_every": 1,
            "data.workers": 2, "checkpoint.every_steps": 1000}
    return [sys.executable, "train.py", "--config", "configs/demo.py:vqa", *(f"--config.{key}={value}" for key, value in keys.items())]


def begin(command, workdir, least=3):
    """A run behind its first updates, and the processes of its workers."""
    process = subprocess.Popen([*command, "--workdir", str(workdir)], cwd=ROOT, env={**os.environ, "XLA_FLAGS": xla.flags()},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= least) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [int(pid) for file in children for pid in file.read_text().split()]
    return process, [pid for pid in pids if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_run_whose_workers_hang_is_saved_by_the_first_signal_and_one_whose_worker_dies_by_itself(command, tmp_path):
    workdir = tmp_path / "run"
    process, pids = begin(command, workdir)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    step, damaged = newest_intact_step(workdir)
    assert process.returncode == 75 and time.monotonic() - begun < 30 and step and not damaged, out + err
    assert "stopped while waiting for a batch" in out and f"stopped and saved at step {step} of" in out and "Traceback" not in err

    process, pids = begin(command, workdir, step + 3)
    os.kill(pids[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    saved, damaged = newest_intact_step(workdir)
    assert process.returncode == 1 and saved > step and not damaged
    (line,) = err.splitlines()
    assert line.startswith("error: loader worker ") and f"(process {pids[1]}) was killed by SIGKILL" in line
    assert line.endswith(f"; step {saved} is saved") and runs.log_lines(workdir)[-1]["step"] == saved
