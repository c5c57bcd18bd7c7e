"""Several processes of one run: how they find each other, what they hand over, and how they end."""

import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jax  # noqa: F401  as in a program that has begun
import pytest

from llavamed_jax.cli import clusters, parent, processes
from llavamed_jax.cli import eval as cli
from llavamed_jax.cli.clusters import Place
from llavamed_jax.errors import UsageError
from llavamed_jax.parallel import distributed
from tests.support.several import Store

ROOT = Path(__file__).resolve().parents[2]
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


# --- who is one of several ---


def flags(coordinator=None, num_processes=None, process_id=None):
    return Namespace(coordinator=coordinator, num_processes=num_processes, process_id=process_id)


def test_flags_name_a_place():
    assert processes.asked(flags("host:1234", 4, 3), {}) == Place("host:1234", 4, 3)
    assert processes.asked(flags("[::1]:1234", 2, 0), {}) == Place("[::1]:1234", 2, 0)
    assert processes.asked(flags(), {}) is None
    assert processes.asked(flags(num_processes=1), SLURM) is None, "one process runs alone wherever it is"
    assert processes.asked(flags("host:1", 2, 0), SLURM).coordinator == "host:1", "flags before the cluster"


@pytest.mark.parametrize("given, message", [
    (flags("host:1234"), "--num_processes and --process_id are missing"),
    (flags(num_processes=2, process_id=0), "--coordinator is missing"),
    (flags("host", 2, 0), "'host'; HOST:PORT was expected"),
    (flags("host:1", 2, 2), "--process_id is 2 and --num_processes is 2"),
    (flags("host:1", 0, 0), "--process_id is 0 and --num_processes is 0"),
    (flags("host:1", 1, 1), "--process_id is 1 and --num_processes is 1"),
])
def test_flags_that_do_not_fit_are_named(given, message):
    with pytest.raises(UsageError, match=message):
        processes.asked(given, {})


def test_a_step_of_several_tasks_is_found_on_slurm():
    assert clusters.detected(SLURM) == Place(None, 2, 1, [], "slurm")
    for alone in ({"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}):
        assert clusters.detected({**SLURM, **alone}) is None
    batch_script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert clusters.detected(batch_script) is None, "a script that starts its tasks with srun is none of them"


@pytest.mark.parametrize("tasks, index, visible, devices", [
    ("1(x2)", "0", "0,1,2,3,4,5,6,7", []),  # one process for all GPUs of a host, of which jax would take the first
    ("8(x2)", "3", "0,1,2,3,4,5,6,7", range(3, 4)),
    ("2(x4)", "1", "0,1,2,3,4,5,6,7", range(4, 8)),
    ("8(x2)", "3", "5", []),  # --gpus-per-task=1
    ("4", "2", "", None),
])
def test_a_task_takes_its_part_of_the_gpus(tasks, index, visible, devices):
    found = clusters.detected({**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": index, "CUDA_VISIBLE_DEVICES": visible})
    assert found.local_devices == devices


@pytest.mark.parametrize("per_host, tasks", [
    ("1,2", [(0, 0, []), (1, 0, range(4)), (1, 1, range(4, 8))]),
    ("2,1", [(0, 1, range(4, 8)), (1, 0, [])]),
    ("2(x3),1", [(2, 0, range(4)), (3, 0, []), ("", 0, None), (4, 0, None)]),  # not said, and beyond the list: jax decides
])
def test_hosts_with_unequal_tasks(per_host, tasks):
    """Each task shares the GPUs with those of its own host: host, index there, devices."""
    for host, index, devices in tasks:
        found = clusters.detected({**SLURM, "SLURM_STEP_TASKS_PER_NODE": per_host, "SLURM_NODEID": str(host), "SLURM_LOCALID": str(index),
                                   "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
        assert found.local_devices == devices


def test_hosts_of_a_tpu_are_found(monkeypatch):
    monkeypatch.setattr(clusters, "_is_tpu_host", lambda environment: True)
    assert clusters.detected({"TPU_WORKER_HOSTNAMES": "a,b"}) == Place()
    assert clusters.detected({"TPU_WORKER_HOSTNAMES": "a"}) is None
    assert clusters.detected({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == Place()
    for endpoints, found in (("", None), ("unknown:unknown:10.0.0.2", None), ("10.0.0.2,10.0.0.3", Place())):
        monkeypatch.setattr(clusters, "_metadata", lambda key, endpoints=endpoints: endpoints)
        assert clusters.detected({}) == found


def test_a_machine_without_tpu_asks_nobody(monkeypatch):
    monkeypatch.setattr(clusters, "_metadata", lambda key: pytest.fail("there is nobody to ask"))
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
    assert clusters.detected({}) is None
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: name)  # libtpu is there to compile for machines elsewhere
    assert clusters.detected({"JAX_PLATFORMS": "cpu"}) is None
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JAX_PLATFORMS": "cuda"}
    assert clusters.detected(pod) is None and clusters.detected({**pod, "JOB_COMPLETION_INDEX": "0"}) == Place()


def test_devices_that_are_named_are_not_shared_out_again():
    eight = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert clusters.detected({**eight, "JAX_LOCAL_DEVICE_IDS": "3"}) == Place(None, 2, 1, None, "slurm")
    assert clusters.detected({**eight, "SLURM_LOCALID": "2"}) == Place(None, 2, 1, None, "slurm"), "beyond what the step says: jax decides"
    of_the_job = {name: value for name, value in eight.items() if name != "SLURM_STEP_TASKS_PER_NODE"}
    assert clusters.detected({**of_the_job, "SLURM_TASKS_PER_NODE": "4(x2)"}) == Place(None, 2, 1, range(0, 2), "slurm")


def test_a_step_of_fewer_tasks_than_the_job_waits_for_its_own(monkeypatch):
    """jax reads SLURM_NTASKS, which in a script that calls mpirun or sets it may be the job's."""
    assert clusters.detected({**SLURM, "SLURM_NTASKS": "8"}).count == 2


OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}


def test_ranks_of_open_mpi_are_found(capsys):
    """mpirun in a SLURM job passes on the variables of its helper, of which there is one a host: Open MPI's count."""
    for around in ({}, SLURM):
        assert clusters.detected({**around, **OPEN_MPI}) == Place(None, 4, 3, None, "ompi")
        found = clusters.detected({**around, **OPEN_MPI, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
        assert found.local_devices == range(4, 8)
    assert clusters.detected({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}) is None and capsys.readouterr().err == ""
    newer = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    assert clusters.detected(newer) is None
    assert capsys.readouterr().err.startswith("warning: this process is one of 4 of Open MPI and runs alone, because this version")


def test_a_pod_needs_the_package_that_asks_for_its_size(monkeypatch, capsys):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JAX_PLATFORMS": "cuda", "JOB_COMPLETION_INDEX": "0"}
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
    assert clusters.detected(pod) is None and "pip install kubernetes" in capsys.readouterr().err


@pytest.mark.parametrize("vendor, found", [("0x1ae0\n", Place()), ("0x10de\n", None)])  # Google's, NVIDIA's
def test_a_tpu_is_told_by_its_vendor_and_asks_its_machine(monkeypatch, tmp_path, vendor, found):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"a:b:10.0.0.2,c:d:10.0.0.3")

        def log_message(self, *_):
            pass

    asked = []
    (tmp_path / "0000:00:04.0").mkdir()
    (tmp_path / "0000:00:04.0" / "vendor").write_text(vendor)
    monkeypatch.setattr(clusters, "Path", lambda _: tmp_path)
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: name)
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        assert clusters.detected({}) == found
        server.shutdown()
    assert asked == ([("/computeMetadata/v1/instance/attributes/worker-network-endpoints", "Google")] if found else [])
    assert clusters._metadata("worker-network-endpoints") == "", "nobody answers any more"
    assert clusters.detected({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": ""}) == found


def test_flags_beside_predictions_are_refused(capsys):
    assert cli.main(["--config", "c", "--workdir", "w", "--predictions", "p", "--process_id", "1"]) == 2
    assert "--process_id needs a model" in capsys.readouterr().err


# --- the parent ---

# Runs as the child of a parent that is not named anywhere else: jax is not imported.
CHILD = """
import os, signal, sys, time
from llavamed_jax.cli import parent
from llavamed_jax.cli.clusters import Place
parent.stay_behind(Place("host:1", 2, 1))
"""
RUNTIME = """E1128 01:29:56.077489   21915 coordination_service_agent.cc:289] Polled an error from coordination service.
F1128 01:29:56.077634   21915 client.h:80] Terminating process because the JAX distributed service detected fatal errors. absl::Status: %s
*** Check failure stack trace: ***
    @     0x7f3967720634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
LOST = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\nThe tasks have crashed."
NO_COORDINATOR = "UNAVAILABLE: Socket closed"
NOT_ALL_CAME = "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/RegisterTask"
TWICE = "ABORTED: 1 unexpectedly tried to connect with a different incarnation. It has likely restarted."


def child(code):
    return subprocess.Popen([sys.executable, "-c", CHILD + code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_parent_ends_as_its_child_does():
    ends = {
        "print('out'); print('Err', file=sys.stderr); sys.exit(75)": (75, "out\n", "Err\n"),
        "os.write(2, b'half a line'); os._exit(0)": (0, "", "half a line"),
        "os.kill(os.getpid(), signal.SIGKILL)":
            (1, "", "error: process 1 was killed by SIGKILL, which the system sends when memory runs out\n"),
        f"os.write(2, b'before\\n' + {(RUNTIME % LOST).encode()!r}); os.abort()":
            (1, "", "before\nerror: process 1 has ended or cannot be reached, so process 1 ends too; the saved state is kept, and "
                    "starting all processes again resumes from it\n"),
        "os.write(2, b'something else\\n'); os.abort()": (1, "", "something else\nerror: process 1 was killed by SIGABRT\n"),
    }
    running = [child(code) for code in ends]
    for process, wanted in zip(running, ends.values(), strict=True):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == wanted


def test_a_parent_passes_signals_on():
    process = child("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_a_child_does_not_outlive_its_parent():
    process = child("print(os.getpid(), flush=True); time.sleep(60)")
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.kill()
    process.wait()
    assert process.stdout.read() == "", "the pipe is closed when the last who holds it is gone"


@pytest.mark.parametrize("words, wanted", [
    (LOST, "process 1 has ended or cannot be reached, so process 0 ends too; the saved state"),
    (LOST.replace("\n1\n", "\n1,3\n"), "process 1, 3 has ended or cannot be reached"),
    (NO_COORDINATOR, "process 0 has ended or cannot be reached, so process 0 ends too"),
    (NOT_ALL_CAME, "timeout: process 0 of 2 waited for the other processes at host:1, and not all of them joined; start each"),
    (TWICE, "two processes were started with the same --process_id"),
    ("INTERNAL: ?", "another process has ended or cannot be reached"),
])
def test_the_last_words_are_explained(words, wanted):
    said = parent.explained(RUNTIME % words, "process 0", Place("host:1", 2, 0))
    assert said.startswith(wanted) and "\n" not in said


def test_words_that_end_nothing_are_let_go():
    source, target = os.pipe(), os.pipe()
    relay = parent.Relay(source[0], target[1], patience_s=0.2)
    relay.start()
    os.write(source[1], b"one\n" + (RUNTIME % LOST).encode()[:80])
    os.write(source[1], b" more\ntwo\n")
    assert os.read(target[0], 1000) == b"one\n"
    assert os.read(target[0], 1000).endswith(b" more\ntwo\n"), "the process went on, so nothing is kept from whoever reads along"
    os.close(source[1])
    relay.join(5)
    assert not relay.is_alive() and not relay.held


def test_words_that_come_in_pieces_are_held_whole():
    source, target = os.pipe(), os.pipe()
    relay = parent.Relay(source[0], target[1])
    relay.start()
    words = (RUNTIME % LOST).encode()
    os.write(source[1], b"before\n" + words[:30])
    assert os.read(target[0], 1000) == b"before\n"
    time.sleep(0.1)
    os.write(source[1], words[30:])
    os.close(source[1])
    relay.join(5)
    assert relay.held == words


def test_a_program_that_has_begun_is_not_forked(monkeypatch):
    """jax is here, whose threads a fork would lose."""
    monkeypatch.setattr(parent.os, "fork", lambda: pytest.fail("forked"))
    assert "jax" in sys.modules
    parent.stay_behind(Place("host:1", 2, 1))


# --- what is handed over ---


def in_threads(*calls):
    results = [None] * len(calls)

    def run(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_values_of_any_size_are_handed_over(monkeypatch):
    monkeypatch.setattr(distributed, "_POLL_S", 0.05)  # several waits, while the last comes late
    store = Store()
    groups = [distributed.Group(store, k, 3) for k in range(3)]
    values = [b"zero", os.urandom(5 * 2**19), b""]

    def work(group):
        time.sleep(0.2 * (group.index == 2))
        found = group.gather(values[group.index])
        return found, group.broadcast(b"for all" if group.index == 0 else None), group.gather(b"again"), group.broadcast(b"")

    first, *others = in_threads(*(lambda g=g: work(g) for g in groups))
    assert first == (values, b"for all", [b"again"] * 3, b"")
    assert others == [([], b"for all", [], b"")] * 2
    assert not [key for key in store.values if "/1/" in key or "/2/" in key or "/3/" in key], "what all have taken is not kept"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # that of the process's end
def test_a_failure_is_heard_by_the_others(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(distributed, "_POLL_S", 0.02)
    monkeypatch.setattr(distributed.os, "_exit", lambda status: (ended.append(status), sys.exit()))
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    groups = [distributed.Group(Store(), 0, 2)]
    groups.append(distributed.Group(groups[0]._client, 1, 2))
    for group in groups:
        group.when_failed(lambda group=group: ended.append(f"last act of {group.index}"))
        group.watch()
    groups[1].tell("failure", status=2, sentence="the disk is full")
    groups[1].tell("failure", status=1, sentence="the first word counts")
    groups[1].farewell()
    groups[0]._watcher.join(10)
    assert ended == ["last act of 0", 2] and groups[1]._watcher.is_alive(), "only the others"
    assert capsys.readouterr().err == "error: process 1 failed: the disk is full\n"
    groups[1].leave()


def test_a_stop_is_heard_once(monkeypatch):
    monkeypatch.setattr(distributed, "_POLL_S", 0.02)
    groups, heard = [distributed.Group(Store(), 0, 2)], []
    groups.append(distributed.Group(groups[0]._client, 1, 2))
    for group in groups:
        group.when_stopped(lambda group=group: heard.append(group.index))
        group.watch()
    groups[0].tell("stop")
    deadline = time.monotonic() + 10
    while not heard and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    for group in groups:
        group.leave()
    assert heard == [1]


@pytest.mark.parametrize("status, sentence, wanted", [
    (0, None, ["leave"]), (75, None, ["stop", "leave"]), (2, "the disk is full", [("fail", 2, "the disk is full"), ("exit", 2)])])
def test_a_process_parts_from_the_others(monkeypatch, status, sentence, wanted):
    """Done, stopped with everything saved, failed; each once."""
    told = []
    monkeypatch.setattr(processes, "_joined", True)
    monkeypatch.setattr(distributed, "leave", lambda: told.append("leave"))
    monkeypatch.setattr(distributed, "stop", lambda: told.append("stop"))
    monkeypatch.setattr(distributed, "fail", lambda *words: told.append(("fail", *words)))
    monkeypatch.setattr(processes.os, "_exit", lambda status: told.append(("exit", status)))
    processes.part(status, sentence)
    processes.part(status, sentence)
    assert told == wanted


def test_a_silent_process_still_complains(monkeypatch, capsys):
    """And an error of a broken connection waits for a better word."""
    slept = []
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    with open(os.devnull, "w") as nowhere:
        monkeypatch.setattr(sys, "stderr", nowhere)
        monkeypatch.setattr(processes, "_joined", True)
        processes.complain("the disk is full")
        processes.trace(ValueError("no such layer"))
        assert slept == []
        processes.trace(RuntimeError("Gloo: Connection reset by peer"))
    error = capsys.readouterr().err
    assert error.startswith("error: the disk is full\n") and "no such layer" in error and slept == [distributed.HEARTBEAT_S + 10]


def test_alone_nothing_waits():
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    assert distributed.gather(b"x") == [b"x"] and distributed.from_first(lambda: {"a": 1}) == {"a": 1}
    distributed.stop()
    distributed.fail(1, "no one hears it")
    distributed.leave()
