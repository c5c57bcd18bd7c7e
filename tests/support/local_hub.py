"""A model hub on loopback: as much of huggingface.co's protocol as `huggingface_hub` needs to list and fetch a model.

    with LocalHub({"owner/name": directory}) as hub:      # HF_ENDPOINT=hub.url, HF_HUB_OFFLINE=0
    python -m tests.support.local_hub owner/name=DIRECTORY …      # prints the address, serves until it is stopped

What it says of a file is what the hub says: large ones (weights, SentencePiece models) are LFS files whose sha256 is their
hash, all others have git's blob hash. The commit is a hash over both, so that it changes when a file does.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".h5", ".msgpack")
CHUNK = 1 << 20


@functools.cache
def _file_hash(file: Path, size: int, modified_ns: int) -> str:
    """sha256 of an LFS file, git's blob hash of another; hashed once for each state of the file."""
    digest = hashlib.sha256() if file.suffix in LFS_SUFFIXES else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


class Repository:
    """A directory as the hub shows it: one commit, under the names `main` and `v1` and its hash."""

    def __init__(self, name: str, directory: Path):
        self.name, self.directory = name, directory

    def files(self) -> dict[str, Path]:
        return {str(p.relative_to(self.directory)): p for p in sorted(self.directory.rglob("*")) if p.is_file()}

    def hash(self, file: Path) -> str:
        status = file.stat()
        return _file_hash(file, status.st_size, status.st_mtime_ns)

    @property
    def commit(self) -> str:
        listing = "".join(f"{name} {self.hash(file)}\n" for name, file in self.files().items())
        return hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()

    def has_revision(self, revision: str) -> bool:
        return revision in ("main", "v1", self.commit)

    def info(self) -> dict:
        siblings = []
        for name, file in self.files().items():
            entry = {"rfilename": name, "size": file.stat().st_size, "blobId": self.hash(file)[:40]}
            if file.suffix in LFS_SUFFIXES:
                entry["lfs"] = {"size": file.stat().st_size, "sha256": self.hash(file), "pointerSize": 130}
            siblings.append(entry)
        return {"_id": "0", "id": self.name, "modelId": self.name, "sha": self.commit, "private": False, "gated": False,
                "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}

    def tree(self) -> list[dict]:
        out = []
        for name, file in self.files().items():
            entry = {"type": "file", "path": name, "size": file.stat().st_size, "oid": self.hash(file)[:40]}
            if file.suffix in LFS_SUFFIXES:
                entry["lfs"] = {"size": file.stat().st_size, "oid": self.hash(file), "pointerSize": 130}
            out.append(entry)
        return out


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Mapping[str, Repository]
    requests: list[str]
    hub: LocalHub

    def do_GET(self):
        self._answer(has_body=True)

    def do_HEAD(self):
        self._answer(has_body=False)

    def log_message(self, *args):
        pass  # the list of requests is the log

    def _answer(self, has_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repository = self.repositories.get(match[1]) if match else None
        if repository is None:
            return self._refuse(401, "RepoNotFound")
        revision = (api[3] if api else file[2]) or "main"
        if not repository.has_revision(revision):
            return self._refuse(404, "RevisionNotFound")
        if api:
            return self._send_json(repository.tree() if api[2] == "tree" else repository.info(), has_body)
        target = repository.files().get(file[3])
        if target is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
        self._send_file(repository, target, has_body)

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_json(self, value, has_body: bool) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def _send_file(self, repository: Repository, file: Path, has_body: bool) -> None:
        size, start = file.stat().st_size, 0
        resumed = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if resumed:
            start = int(resumed[1])
        self.send_response(206 if resumed else 200)
        if resumed:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        headers = {"ETag": f'"{repository.hash(file)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream", "Content-Length": str(size - start)}
        if file.suffix in LFS_SUFFIXES:
            headers |= {"X-Linked-Etag": f'"{repository.hash(file)}"', "X-Linked-Size": str(size)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body and self.hub.break_off is not None and file.suffix in LFS_SUFFIXES:
            with file.open("rb") as stream:
                stream.seek(start)
                self.wfile.write(stream.read(self.hub.break_off))
            self.close_connection = True
        elif has_body:
            with file.open("rb") as stream:
                stream.seek(start)
                while block := stream.read(CHUNK):
                    self.wfile.write(block)


class LocalHub:
    """Serves directories as models, on a port of its own. A context; `requests` lists what was asked for.

    Args:
      models: `owner/name` -> directory.
      port: 0 takes a free one.
      break_off: bytes after which the sending of an LFS file is cut; it may be changed while the hub serves. None: never.
    """

    def __init__(self, models: Mapping[str, str | Path], port: int = 0, break_off: int | None = None):
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {
            "repositories": {name: Repository(name, Path(directory)) for name, directory in models.items()},
            "requests": self.requests, "hub": self})
        self.break_off = break_off
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        """Serves in this thread until it is interrupted."""
        try:
            self._server.serve_forever()
        except KeyboardInterrupt:
            self._server.server_close()


def ask(monkeypatch, url, home, is_offline=False):
    """Makes this process one that was started with the hub's address, and with a home whose cache is its own."""
    from huggingface_hub import constants

    from llavamed_jax.checkpoints import hub
    for name, value in (("ENDPOINT", url), ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"),
                        ("HF_HUB_CACHE", str(home / "hub")), ("HF_HUB_OFFLINE", is_offline), ("HF_HUB_DISABLE_PROGRESS_BARS", True)):
        monkeypatch.setattr(constants, name, value)
    hub._fetch.cache_clear()
    hub._print_licence.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="OWNER/NAME=DIRECTORY")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    hub = LocalHub(dict(model.split("=", 1) for model in args.models), args.port)
    print(f"HF_ENDPOINT={hub.url}", flush=True)
    hub.serve()


if __name__ == "__main__":
    main()
