"""Objects and locks of a bucket: both stores behave alike, one run of several gets a lock, and every failure is one sentence."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from benchmarks import emulators
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.utils import bucket_lock, buckets, hashes, paths
from llavamed_jax.utils.bucket_lock import BucketLock, Taken
from llavamed_jax.utils.buckets import Bucket, Missing, Refused
from tests.support import stores

MODULES = dict(buckets._MODULES)  # which the store in memory replaces


@pytest.fixture(scope="module", params=["memory", "gs", "s3"])
def scheme(request, tmp_path_factory):
    with stores.running(request.param, tmp_path_factory.mktemp("cache")) as scheme:
        yield scheme


@pytest.fixture
def bucket(scheme):
    return Bucket(stores.address(scheme))


def test_objects(bucket, tmp_path):
    """Odd names, an empty file and one of several megabytes; a listing knows sizes, and a version that follows the content."""
    contents = {"a b#?%41ü.x": b"odd", "below/it/f": b"", "large": os.urandom(3_000_000), ".hidden": b"h"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert bucket.entries() == {}
    bucket.upload(tmp_path, [*contents, "gone in the meantime"])
    first = bucket.entries()
    assert {name: entry.size for name, entry in first.items()} == {name: len(content) for name, content in contents.items()}
    assert list(bucket.entries("below/")) == ["below/it/f"]
    bucket.download(tmp_path / "back", list(contents))
    assert {name: (tmp_path / "back" / name).read_bytes() for name in contents} == contents
    assert not [name for _, _, names in os.walk(tmp_path / "back") for name in names if name.endswith(".tmp")]
    bucket.write("large", b"small now")
    second = bucket.entries()
    assert bucket.read("large") == b"small now" and second["large"].version != first["large"].version
    assert second["below/it/f"] == first["below/it/f"]
    bucket.delete(["large", "below/it/f", "never there"])
    assert sorted(bucket.entries()) == [".hidden", "a b#?%41ü.x"]
    with pytest.raises(Missing, match=rf"{bucket.url}/none cannot be read: it does not exist$"):
        bucket.read("none")
    with pytest.raises(Missing, match="cannot be read: it does not exist"):
        bucket.download(tmp_path / "other", [".hidden", "none"])
    with pytest.raises(UserError, match="is not a name that a file can have"):
        bucket.download(tmp_path / "other", ["../outside"])
    with pytest.raises(Missing, match="the bucket nobodys does not exist"):
        Bucket(bucket.url.replace("bucket/", "nobodys/", 1)).entries()
    with pytest.raises(Missing, match="the bucket nobodys does not exist"):
        Bucket(bucket.url.replace("bucket/", "nobodys/", 1)).write("x", b"")


def test_a_local_file_that_is_refused_is_no_matter_of_credentials(bucket, tmp_path, monkeypatch):
    bucket.write("f", b"x")
    monkeypatch.setenv(buckets.DIRECTORY, str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"/f cannot be read: (Not a directory|File exists) at /.*/file.* on this machine .LLAVAMED_BUCKET_CACHE names"):
        bucket.download(tmp_path / "file", ["f"])
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied", "/root/x")))
    with pytest.raises(UserError, match="/f cannot be read: Permission denied at /root/x on this machine$"):  # no local copy: a key file, say
        bucket.download(tmp_path, ["f"])


def test_one_of_several_creates_an_object(bucket):
    others = [Bucket(bucket.url) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        for turn in range(5):
            made = list(threads.map(lambda k, name=f"x{turn}": others[k].create(name, b"%d" % k), range(6)))
            assert sum(made) == 1 and bucket.read(f"x{turn}") == b"%d" % made.index(True)
    assert bucket.create("x0", bucket.read("x0"))  # the answer to a request was lost, and the library sent it again


def test_a_lock_has_one_owner(bucket):
    first = BucketLock(bucket)
    first.take()
    (name,) = bucket.entries(".lock/")
    record = json.loads(bucket.read(name))
    assert record["pid"] == os.getpid() and record["host"] and record["since"] <= record["time"]
    with pytest.raises(UserError, match=rf"the workdir {bucket.url} is in use by another run \(process {os.getpid()} on .*, since 20.*Z?.*renewed 20"):
        BucketLock(bucket).take()
    first.renew()
    assert json.loads(bucket.read(name))["time"] > record["time"]
    first.release()
    second = BucketLock(bucket)
    second.take()
    assert list(bucket.entries(".lock/")) == [".lock/2"]
    with pytest.raises(Taken, match=r"was taken by another run \(process"):
        first.renew()
    second.check()
    bucket.delete([".lock/2"])
    with pytest.raises(Taken, match="the lock of .* was removed; nothing more is saved there"):
        second.check()


@pytest.mark.parametrize("change", ["upload", "delete"])
@pytest.mark.parametrize("scheme", ["memory"], indirect=True)
@pytest.mark.parametrize("begun_by", ["a file", "the lock's thread"])
def test_files_that_wait_for_one_renewal_fail_with_it(begun_by, change, bucket, tmp_path, monkeypatch):
    """A store that does not answer is waited for once, and not once for each file; the next copy asks again."""
    asked, arrived, began = [], [], time.monotonic()
    lock = BucketLock(bucket)
    lock.take()
    lock._renewed -= bucket_lock.STALE_S / 2 + 1
    names = [f"f{number}" for number in range(5 * buckets._THREADS)]
    for name in names:
        (tmp_path / name).touch()

    class Renewing:
        mutex = threading.Lock()

        def __enter__(self):
            arrived.append(1)
            self.mutex.acquire()

        def __exit__(self, *_):
            self.mutex.release()

    def silent(*_):
        asked.append(1)
        while len(arrived) < buckets._THREADS + (begun_by != "a file") and time.monotonic() < began + 60:
            time.sleep(0.01)
        raise UserError("the store does not answer")

    files = Bucket(bucket.url, before_change=lock.confirm)
    act = (lambda: files.upload(tmp_path, names)) if change == "upload" else (lambda: files.delete(names))
    keeper = threading.Thread(target=lambda: pytest.raises(UserError, lock.renew))
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_renewing", Renewing())
        patch.setattr(Bucket, "entries", silent)
        if begun_by != "a file":
            keeper.start()
            while not asked:
                time.sleep(0.01)
        with pytest.raises(UserError, match="^the store does not answer$"):
            act()
    assert asked == [1] and len(arrived) == buckets._THREADS + (begun_by != "a file")
    act()
    assert set(bucket.entries()) == {".lock/1", *(names if change == "upload" else ())}


def test_of_many_that_take_a_lock_at_once_one_gets_it(bucket):
    def race(k):
        try:
            BucketLock(Bucket(f"{bucket.url}/{k // 5}")).take()
        except UserError as error:
            assert "is in use by another run" in str(error)
            return 0
        return 1

    with ThreadPoolExecutor(5) as threads:
        got = list(threads.map(race, range(20)))
    assert [sum(got[k:k + 5]) for k in range(0, 20, 5)] == [1] * 4


def test_the_lock_of_a_killed_run_of_this_machine_is_taken_at_once(bucket):
    """Its process is gone; one of the same number that was started later is another process."""
    killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
    record = {**bucket_lock._process(killed.pid), "id": "x", "host": "here"}
    assert record["started"] and record["machine"]
    bucket.write(".lock/7", json.dumps(record).encode())
    with pytest.raises(UserError, match=f"in use by another run .process {killed.pid} on here"):
        BucketLock(bucket).take()
    bucket.write(".lock/8", json.dumps({**record, "started": record["started"] - 1}).encode())
    BucketLock(bucket).take()
    assert list(bucket.entries(".lock/")) == [".lock/9"]
    bucket.write(".lock/10", json.dumps(record).encode())
    killed.kill()
    killed.wait()
    BucketLock(bucket).take()


def test_the_lock_of_another_machine_is_stale_once_nobody_renews_it(bucket, monkeypatch, capsys):
    monkeypatch.setattr(bucket_lock, "STALE_S", 0.6)
    monkeypatch.setattr(bucket_lock, "_POLL_S", 0.05)
    for number, content in enumerate((b'{"machine": "another", "pid": 1, "host": "h"}', b"no JSON", b"[]"), 1):
        bucket.write(f".lock/{2 * number}", content)
        began = time.monotonic()
        lock = BucketLock(bucket)
        lock.take()
        assert time.monotonic() - began > bucket_lock.STALE_S and lock._number == 2 * number + 1
        monkeypatch.setattr(bucket_lock, "STALE_S", 0.1)  # of those without a sentence of their own
    assert "the lock counts as stale once it has not been renewed for 1 s" in capsys.readouterr().out
    monkeypatch.setattr(bucket_lock, "STALE_S", 600.0)
    bucket.write(".lock/20", b"{}")
    # What is called while the lock is watched renews it, as its run would.
    monkeypatch.setattr(bucket_lock.signals, "check", lambda: bucket.write(".lock/20", b'{"machine": "another", "time": 1}'))
    with pytest.raises(UserError, match="is in use by another run"):
        BucketLock(bucket).take()


def test_a_store_without_preconditions_is_refused(bucket, monkeypatch):
    monkeypatch.setattr(Bucket, "create", lambda self, name, content: self.write(name, content) or True)
    with pytest.raises(UserError, match="writes an object that exists although the request forbids it"):
        BucketLock(bucket).take()


@pytest.mark.parametrize("scheme, status, sentence", [
    ("gs", 401, "no valid credentials were found .*gcloud auth application-default login"),
    ("gs", 403, "the credentials do not permit it"), ("s3", 403, "the credentials do not permit it"), ("s3", 400, "cannot be read")])
def test_answers_that_refuse(scheme, status, sentence, monkeypatch):
    pytest.importorskip(stores.PACKAGES[scheme][0])
    monkeypatch.setattr(buckets, "_MODULES", MODULES)

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            body = b'{"error": {"code": %d, "message": "no"}}' % status if scheme == "gs" else b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
            if status == 400:
                body = b"<html>not a store"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with emulators.environment({"STORAGE_EMULATOR_HOST": url, "AWS_ENDPOINT_URL": url, **emulators.KEYS}):
        with pytest.raises(UserError, match=sentence) as caught:
            Bucket(f"{scheme}://bucket/x").entries()
    server.shutdown()
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{scheme}://bucket/x cannot be read")
    assert isinstance(caught.value, Refused) == (status != 400)  # which a run does not try again


def test_missing_credentials_of_s3(monkeypatch, tmp_path):
    pytest.importorskip("s3fs")
    for name in emulators.KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="s3://bucket/x cannot be read: no valid credentials were found .*; run `aws configure`"):
        Bucket("s3://bucket/x").entries()


def test_addresses():
    assert paths.split_bucket("gs://b.c-d_e/k/l m/") == ("gs", "b.c-d_e", "k/l m")
    for url in ("gs://b", "gs://b/", "gs://", "s3:///k", "gs://B/k", "gs://b//k", "gs://b/k//l", "gs://b/../k", "gs://b/./k", "s3://b/k//"):
        with pytest.raises(UsageError, match="is not an address in a bucket; gs://BUCKET/KEY or s3://BUCKET/KEY was expected"):
            paths.split_bucket(url)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(buckets, "_MODULES", MODULES)
    for scheme, (package, module, _) in MODULES.items():
        for name in {package, module}:  # a module that is imported already is found without its package
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"^{package}, which reads and writes {scheme}:// addresses, is not installed: pip install 'llavamed-jax\[cloud\]'$"):
            Bucket(f"{scheme}://bucket/x")


def test_the_directory_of_copies(monkeypatch, tmp_path):
    monkeypatch.setenv(buckets.DIRECTORY, str(tmp_path / "x"))
    assert buckets.local_copies() == tmp_path / "x" and buckets.is_local_copy(tmp_path / "x" / "y") and not buckets.is_local_copy(tmp_path)
    monkeypatch.setenv(buckets.DIRECTORY, "relative")
    with pytest.raises(UserError, match="an absolute path was expected in LLAVAMED_BUCKET_CACHE"):
        buckets.local_copies()
    assert not buckets.is_local_copy(tmp_path)
    monkeypatch.delenv(buckets.DIRECTORY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert buckets.local_copies() == Path(tmp_path) / "llavamed_jax" / "buckets"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="this user has no home directory; LLAVAMED_BUCKET_CACHE must name a directory"):
        buckets.local_copies()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hashes, "LARGE", 1)
    monkeypatch.setattr(hashes, "_RECENT_S", -1e9)
    (tmp_path / "f").write_bytes(b"large")
    assert hashes.sha256_of(tmp_path / "f") == hashes.sha256(b"large") and os.listdir(tmp_path) == ["f"]  # remembered nowhere
