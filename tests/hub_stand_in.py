"""A stand-in for the Hugging Face Hub on loopback: the endpoints that its client reads and writes.

It answers `/api/models/NAME[/revision/REVISION]`, `.../tree/REVISION` and
`/NAME/resolve/REVISION/FILE`, with ranges, commits, sizes and hashes in the Hub's headers. It takes
repositories, commits and large files by the protocol of Git LFS, not by Xet, which the client must
have off (`HF_HUB_DISABLE_XET`). Point `HF_ENDPOINT` at `HubStandIn.address`.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".npz", ".pth")
"""Files that the Hub keeps outside git, whose hash it states."""


@dataclass
class Repository:
    """A repository with one commit."""

    files: dict[str, bytes]
    revisions: frozenset[str] = frozenset({"main"})
    fault: str | None = None
    """The Hub's code for refusing it, such as `GatedRepo`."""
    private: bool = False
    messages: list[str] = field(default_factory=list)
    """Those of the commits that were uploaded."""

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


@dataclass
class HubStandIn:
    """Repositories and other files by their path, and what was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    web: dict[str, bytes] = field(default_factory=dict)
    """Files at plain addresses, such as `/files/x.npz`."""
    requests: list[str] = field(default_factory=list)
    """`GET /path` of every request so far, with its range if it has one."""
    tokens: set[str] = field(default_factory=set)
    """The tokens that came with requests."""
    damaged: set[str] = field(default_factory=set)
    """Names of files that arrive with other bytes."""
    break_after: int | None = None
    """Bytes after which the next answers break off."""
    breaks: int = 0
    """How many answers do."""
    writers: set[str] = field(default_factory=set)
    """The tokens that may write; others may only read."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that have arrived, by their hash, whether a commit names them or not."""
    broken_commits: int = 0
    """How many commits the connection breaks off at."""
    on_commit: Callable[[], None] = lambda: None
    """Is called before a commit is looked at."""
    states_size: bool = True
    """Whether answers say how long they are; if not, they have no ranges either."""
    address: str = ""

    def gets(self, ending: str) -> list[str]:
        """Returns the downloads of a file."""
        found = (r for r in self.requests if r.startswith("GET "))
        return [request for request in found if request.split(" ")[1].endswith(ending)]


@contextmanager
def hub_stand_in(
    repositories: Mapping[str, Mapping[str, bytes]] | None = None,
) -> Iterator[HubStandIn]:
    """Runs a stand-in with these files while the block runs."""
    found = (repositories or {}).items()
    hub = HubStandIn({name: Repository(dict(files)) for name, files in found})

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: HubStandIn

    def log_message(self, format, *args) -> None:
        """Keeps quiet: `HubStandIn.requests` is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._take()

    def do_POST(self) -> None:
        self._take()

    def _note(self) -> str:
        """Keeps what was asked for, and returns its path."""
        path = unquote(urlsplit(self.path).path)
        span = self.headers.get("Range")
        self.served.requests.append(f"{self.command} {path}{f' {span}' if span else ''}")
        if token := self.headers.get("Authorization"):
            self.served.tokens.add(token)
        return path

    def _take(self) -> None:
        """Answers a request that writes."""
        path, content = self._note(), self._body()
        # Large files go to an address that is secret in itself.
        if path.startswith("/lfs/"):
            self.served.objects[path.removeprefix("/lfs/")] = content
            self._send(200, b"", {})
        elif self.headers.get("Authorization", "").removeprefix("Bearer ") not in (
            self.served.writers
        ):
            self._refuse(403, "Forbidden")
        elif path == "/api/repos/create":
            self._create(json.loads(content))
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._plan_objects(json.loads(content)["objects"])
        elif "/preupload/" in path:
            self._plan_files(json.loads(content)["files"])
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            self._commit(name, [json.loads(line) for line in content.splitlines()])
        else:
            self._refuse(404, "NotFound")

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _create(self, wanted: dict[str, str]) -> None:
        name, known = f"{wanted['organization']}/{wanted['name']}", self.served.repositories
        about = {"url": f"{self.served.address}/{name}", "name": name}
        if name in known:
            self._send_json(about, status=409)
            return
        # Earlier clients write {"private": true}.
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        known[name] = Repository({".gitattributes": b"*.safetensors"}, private=private)
        self._send_json(about)

    def _plan_files(self, files: list[dict[str, str]]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._send_json({"files": modes})

    def _plan_objects(self, objects: list[dict[str, str]]) -> None:
        answers = []
        for entry in objects:
            upload = {"href": f"{self.served.address}/lfs/{entry['oid']}"}
            is_there = entry["oid"] in self.served.objects
            answers.append(entry if is_there else {**entry, "actions": {"upload": upload}})
        self._send_json({"objects": answers, "transfer": "basic"})

    def _commit(self, name: str, lines: list[dict[str, dict[str, str]]]) -> None:
        self.served.on_commit()
        if self.served.broken_commits:
            self.served.broken_commits -= 1
            self.close_connection = True
            return
        repository = self._known(name, "main")
        if repository is None:
            return
        header = lines[0]["value"]
        if header.get("parentCommit", repository.commit) != repository.commit:
            self._refuse(412, "PreconditionFailed")
            return
        for line in lines[1:]:
            file = line["value"]["path"]
            match line["key"]:
                case "file":
                    repository.files[file] = base64.b64decode(line["value"]["content"])
                case "lfsFile":
                    repository.files[file] = self.served.objects[line["value"]["oid"]]
                case "deletedFile":
                    del repository.files[file]
        repository.messages.append(header["summary"])
        commit = repository.commit
        address = f"{self.served.address}/{name}/commit/{commit}"
        self._send_json({"commitUrl": address, "commitOid": commit, "success": True})

    def _send_json(self, document: object, *, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _answer(self) -> None:
        path = self._note()
        if path in self.served.web:
            content = self.served.web[path]
            self._send_file(path, content, {"ETag": f'"{_etag(path, content)}"'})
        elif path.startswith("/api/models/") and "/tree/" in path:
            self._list(*path.removeprefix("/api/models/").split("/tree/"))
        elif path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self._describe(name, revision or "main")
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            self._resolve(name, *rest.split("/", 1))
        else:
            self._refuse(404, "NotFound")

    def _known(self, name: str, revision: str) -> Repository | None:
        """Returns the repository at a revision; None once the request has been refused."""
        repository = self.served.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        elif repository.fault is not None:
            self._refuse(500 if repository.fault == "Down" else 403, repository.fault)
        elif revision not in {*repository.revisions, repository.commit}:
            self._refuse(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _describe(self, name: str, revision: str) -> None:
        if repository := self._known(name, revision):
            siblings = [_sibling(*item) for item in repository.files.items()]
            about = {"id": name, "modelId": name, "sha": repository.commit}
            about |= {"private": repository.private}
            self._send_json(about | {"siblings": siblings, "tags": [], "downloads": 0})

    def _list(self, name: str, revision: str) -> None:
        if repository := self._known(name, revision):
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": _etag(path, content)}
                for path, content in repository.files.items()
            ]
            self._send_json(files)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._known(name, revision)
        if repository is None:
            return
        if file not in repository.files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
            return
        content = repository.files[file]
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{_etag(file, content)}"'}
        if file.endswith(LARGE):
            headers |= {"X-Linked-Size": str(len(content))}
            headers |= {"X-Linked-Etag": f'"{_etag(file, content)}"'}
        self._send_file(file, content, headers)

    def _send_file(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        if name.rpartition("/")[2] in self.served.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        status, span = 200, self.headers.get("Range")
        if self.headers.get("If-Range") not in (None, headers.get("ETag")):
            span = None
        if span and self.served.states_size:
            begin, _, end = span.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or len(content)), len(content) - 1)
            status = 206
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content = content[first : last + 1]
        self._send(status, content, headers | {"Accept-Ranges": "bytes"})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        about = {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}
        self._send(status, b"{}", about)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        hub, sent = self.served, content
        # Before the head is sent, on which a test may go on.
        if self.command != "HEAD" and hub.breaks and hub.break_after is not None:
            if "Accept-Ranges" in headers:
                hub.breaks -= 1
                sent = content[: hub.break_after]
                self.close_connection = True
        if hub.states_size:
            headers = headers | {"Content-Length": str(len(content))}
        else:
            self.close_connection = True
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(sent)


def _etag(file: str, content: bytes) -> str:
    if file.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, object]:
    about = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    if not name.endswith(LARGE):
        return about
    sha256 = hashlib.sha256(content).hexdigest()
    return about | {"lfs": {"sha256": sha256, "size": len(content), "pointerSize": 134}}
