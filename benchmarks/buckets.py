"""Kills runs whose workdir is in a bucket, and lets runs race for one workdir, on stores of this machine (`emulators.py`).

    python benchmarks/buckets.py [--store gs|s3] [--kills 10] [--races 20] [--jobs 1] [--seed 0]

Kills: one run is left alone. Each other one is ended by SIGKILL up to half a second after the bucket has its first, second, … step,
and started again: on the same machine, or, every other one, with an empty directory of local copies, as on another machine.
It has to go on to the same losses, gradients and counts at every step, and to the same parameters, bit for bit, read from the
bucket. Races: two runs are started at once for one new workdir. One has to finish it, and the other one has to end with exit
status 1 and one sentence that names the first; or, if it came after the end of the first, with 0 and the sentence that the run is
finished. Jobs: two processes train together, one of them is killed, and both are started again; the result equals that of two
processes that were left alone. The last line is how many of all went well.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import emulators, runs
from benchmarks.runs import Run
from llavamed_jax.checkpoints.tree import bucket_copy
from llavamed_jax.utils.buckets import Bucket

UPDATES, SAVE_EVERY = 20, 4


def reached(url: str) -> tuple[int | None, str]:
    """The newest step of a run that the bucket has, and in words how far the run had come there."""
    entries = Bucket(url).entries()
    whole = bucket_copy.sealed(entries)
    begun = {int(name.split("/")[1]) for name in entries if name.startswith("checkpoints/") and name.split("/")[1].isdigit()} - {*whole}
    words = f"step {whole[-1]} saved" if whole else "no step saved" if entries else "nothing written"
    return max(whole, default=None), words + (f", step {max(begun)} half uploaded" if begun else "")


def wait_for_a_step(url: str, process: subprocess.Popen, step: int = 0) -> None:
    """Waits until the bucket has this step of a run, or a later one, or until the run has ended."""
    while process.poll() is None and (reached(url)[0] or -1) < step:
        time.sleep(0.05)


def kills(scheme: str, start: Path, base: Path, count: int, draw: random.Random) -> int:
    """Kills and resumes; returns how many of the runs came out as the one that was left alone."""
    address = lambda name: f"{scheme}://{emulators.BUCKET}/{name}"
    begin = lambda name: Run(runs.train(start, address(name), UPDATES, SAVE_EVERY, 0), base / "log", base / "cache")
    length = begin("alone").finish()
    wanted, tensors, good = runs.history(address("alone")), runs.parameters(address("alone")), 0
    print(f"{scheme}: {UPDATES} updates, a save every {SAVE_EVERY}; a run takes {length:.1f} s", flush=True)
    for number in range(count):
        url, step, later = address(number), SAVE_EVERY * (1 + number % (UPDATES // SAVE_EVERY - 1)), draw.uniform(0, 0.5)
        killed = begin(number)
        wait_for_a_step(url, killed.process, step)
        was_running = killed.kill_at(time.monotonic() - killed.started + later)
        state = reached(url)[1]
        if number % 2:
            shutil.rmtree(base / "copies", ignore_errors=True)
        begin(number).finish()
        wrong = runs.difference(url, wanted, tensors)
        good += wrong is None
        print(f"kill {number + 1}, {later:.2f} s after step {step}: {state if was_running else 'it was done already'}; "
              f"{wrong or 'the same run'}", flush=True)
    return good


def race(scheme: str, start: Path, base: Path, number: int) -> str | None:
    """Two runs at once for one workdir; returns what went wrong."""
    words = runs.train(start, f"{scheme}://{emulators.BUCKET}/race{number}", 10, SAVE_EVERY, 0)
    logs = [base / f"race{number}.{k}" for k in range(2)]
    both = [Run(words, log, base / "cache") for log in logs]
    status = [run.process.wait() for run in both]
    said = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    finished = [k for k in range(2) if status[k] == 0 and "finished at step 10 of 10" in said[k]]
    others = [k for k in range(2) if k not in finished]
    if len(finished) != 1:
        return f"{len(finished)} runs trained it: {status}, {said[0][-300:]!r}, {said[1][-300:]!r}"
    error, first = said[others[0]], both[finished[0]].process.pid
    is_refused = status[others[0]] == 1 and f"is in use by another run (process {first} on " in error and error.count("error: ") == 1
    if not is_refused and not (status[others[0]] == 0 and "is finished: it was trained for 10 updates" in error):
        return f"the other one ended with {status[others[0]]}: {error[-300:]!r}"
    return None if [line["step"] for line in runs.history(f"{scheme}://{emulators.BUCKET}/race{number}")] == list(range(1, 11)) else "steps are missing"


def job(words: list[str], log: Path) -> list[subprocess.Popen]:
    """Two processes of one run on this machine, started."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    with open(log, "a", encoding="utf-8") as out:
        return [subprocess.Popen([sys.executable, *words, "--coordinator", address, "--num_processes", "2", "--process_id", str(k)],
                                 cwd=runs.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}, stdout=out, stderr=out)
                for k in range(2)]


def killed_job(scheme: str, start: Path, base: Path, number: int) -> str | None:
    """Kills one of two processes once a step is in the bucket, and starts both again; returns what went wrong."""
    words = lambda name: runs.train(start, f"{scheme}://{emulators.BUCKET}/{name}{number}", UPDATES, SAVE_EVERY, 0)
    alone, killed = (f"{scheme}://{emulators.BUCKET}/{name}{number}" for name in ("whole", "job"))
    log = base / f"job{number}"
    status = [process.wait() for process in job(words("whole"), log)]
    if status != [0, 0]:
        return f"the job that was left alone ended with {status}: {log.read_text(encoding='utf-8')[-500:]!r}"
    running = job(words("job"), log)
    wait_for_a_step(killed, running[1])
    running[1].kill()
    ended = [process.wait() for process in running]
    state, again = reached(killed)[1], [process.wait() for process in job(words("job"), log)]
    print(f"job {number + 1}: one of two processes killed ({state}), exit statuses {ended}, then {again}", flush=True)
    return runs.difference(killed, runs.history(alone), runs.parameters(alone))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("gs", "s3"), default="gs")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    good, begun, draw = 0, time.monotonic(), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, emulators.store(args.store) as variables:
        base = Path(folder)
        with emulators.environment({**variables, "LLAVAMED_BUCKET_CACHE": str(base / "copies")}):
            start = runs.write_start(base / "start")
            good += kills(args.store, start, base, args.kills, draw) if args.kills else 0
            if args.races and not args.kills:
                Run(runs.train(start, base / "warm", 10, SAVE_EVERY, 0), base / "log", base / "cache").finish()
            for number in range(args.races):
                wrong = race(args.store, start, base, number)
                good += wrong is None
                print(f"race {number + 1}: {wrong or 'one run trained, the other one was refused or came after it'}", flush=True)
            for number in range(args.jobs):
                wrong = killed_job(args.store, start, base, number)
                good += wrong is None
                print(f"job {number + 1}: {wrong or 'the same run'}", flush=True)
    print(f"took {(time.monotonic() - begun) / 60:.1f} minutes\n{good}/{args.kills + args.races + args.jobs}")
    return 0 if good == args.kills + args.races + args.jobs else 1


if __name__ == "__main__":
    sys.exit(main())
