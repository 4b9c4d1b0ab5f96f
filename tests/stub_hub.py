"""A Hugging Face hub on loopback: what huggingface_hub and datasets need to fetch files, and the refusals of the real one.

    with StubHub({"user/model": StubRepo({"config.json": b"{}"})}) as hub:
        ...  # start a process with HF_ENDPOINT=hub.endpoint: huggingface_hub reads it when it is imported

The status codes and X-Error-Code headers are those that `huggingface_hub.utils.hf_raise_for_status` tells apart.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

NO_PROXY_ENVIRONMENT = {"NO_PROXY": "*", "no_proxy": "*"}


@dataclass
class StubRepo:
    """One repository with one commit, on the branch main."""

    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    gated: bool = False  # its files are readable with any token whose text starts with "allowed"; its listing is public
    plain_status: int | None = None  # every request fails with it and without an X-Error-Code, as behind some mirrors
    delay_seconds: float = 0.0

    @classmethod
    def of_folder(cls, folder: Path, **arguments) -> "StubRepo":
        return cls({path.name: path.read_bytes() for path in sorted(folder.iterdir())}, **arguments)


class StubHub:
    """Serves `models` and `data_sets` (hub id -> StubRepo) at `endpoint` from a thread until the block ends; `requests` lists "METHOD path"."""

    def __init__(self, models: dict[str, StubRepo] | None = None, data_sets: dict[str, StubRepo] | None = None):
        self.models = models or {}
        self.data_sets = data_sets or {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "StubHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler_of(hub: StubHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def _serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            tail = r"(/(?P<what>revision|tree)/(?P<revision>[^/]+)(/(?P<folder>.*))?)?"
            if match := re.fullmatch(rf"/api/(?P<kind>models|datasets)/(?P<id>.+?){tail}", path):
                self._serve_repo(match["kind"], match["id"], match["what"] or "revision", match["revision"] or "main", match["folder"])
            elif match := re.fullmatch(r"/(?P<kind>datasets)?/?(?P<id>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
                self._serve_repo(match["kind"] or "models", match["id"], "file", match["revision"], match["file"])
            else:
                self._refuse(404, None)

        def _serve_repo(self, kind: str, hub_id: str, what: str, revision: str, file: str | None) -> None:
            repo = (hub.models if kind == "models" else hub.data_sets).get(hub_id)
            if repo is None:
                return self._refuse(404, "RepoNotFound")
            time.sleep(repo.delay_seconds)
            if repo.plain_status is not None:
                return self._refuse(repo.plain_status, None)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if what == "file" and repo.gated and not token.startswith("allowed"):
                return self._refuse(403 if token else 401, "GatedRepo")
            if revision not in ("main", repo.commit):
                return self._refuse(404, "RevisionNotFound")
            if what == "tree" and file:
                return self._send(b"[]", repo)  # there are no folders
            if what == "tree":
                return self._send(json.dumps([_tree_entry(name, content) for name, content in repo.files.items()]).encode(), repo)
            if what == "revision":
                siblings = [{"rfilename": name} for name in repo.files]
                return self._send(json.dumps({"id": hub_id, "sha": repo.commit, "siblings": siblings}).encode(), repo)
            if file not in repo.files:
                return self._refuse(404, "EntryNotFound", repo.commit)
            return self._send(repo.files[file], repo)

        def _send(self, content: bytes, repo: StubRepo) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{_blob_id(content)}"')
            self.send_header("X-Repo-Commit", repo.commit)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _refuse(self, status: int, code: str | None, commit: str | None = None) -> None:
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
            if commit is not None:
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _tree_entry(name: str, content: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
