"""A small Hugging Face Hub on loopback: as much of its protocol as the real client needs to push, list and download.

Repositories live in memory; files above 1 kB and all .safetensors go the way of Git LFS, as on the Hub. Everything
needs the token `TOKEN`, and what was asked is in `requests`.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_" + "a1B2c3D4e5" * 3


class Repository:
    """Files of the branch `main`, by path; one commit after another."""

    def __init__(self, private: bool):
        self.private, self.files, self.commits = private, {".gitattributes": b"*.safetensors filter=lfs\n"}, 0
        self.messages: list[str] = []

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.commits}".encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server with what it holds."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse_commits = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def oid(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size > 100_000


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, body=b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refused(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_any(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):  # signed addresses of an object store: no token
            self.server.lfs[path.removeprefix("/lfs/")] = body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refused(401, "RepoNotFound", "Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name = "/".join(parts[:2]).removesuffix(".git")
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.refused(404, "RepoNotFound", "Repository not found")
        if path.startswith("/api/models/"):
            return self.model(name, repository, parts[2:], body)
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        if parts[2:3] == ["resolve"]:
            return self.resolve(repository, "/".join(parts[4:]))
        return self.refused(404, "EntryNotFound", f"no such page {path}")

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.server.repositories else 200
        if status == 200:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.repositories[name] = Repository(private)
        self.answer(status, {"url": f"{self.server.url}/{name}", "name": name, "error": "You already created it"})

    def model(self, name: str, repository: Repository, action: list[str], body: bytes) -> None:
        if action[:1] in ([], ["revision"]):
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            facts = {"id": name, "modelId": name, "private": repository.private, "sha": repository.sha}
            return self.answer(200, {**facts, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})
        if action[0] == "tree":
            return self.answer(200, [self.entry(path, content) for path, content in sorted(repository.files.items())])
        if action[0] == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": modes})
        if action[0] == "commit":
            return self.commit(name, repository, [json.loads(line) for line in body.splitlines()])
        return self.refused(404, "EntryNotFound", f"no such action {action}")

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        facts: dict = {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
        if is_lfs(path, len(content)):
            sha = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        return facts

    def batch(self, asked: dict) -> None:
        objects: list[dict] = []
        for one in asked["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
            objects.append({**one, **({} if one["oid"] in self.server.lfs else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, repository: Repository, lines: list[dict]) -> None:
        if self.server.refuse_commits:
            return self.refused(403, "Forbidden", "You are over your storage limit")
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.lfs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                repository.messages.append(value["summary"])
        repository.files, repository.commits = files, repository.commits + 1
        return self.answer(
            200, {"success": True, "commitOid": repository.sha, "commitUrl": f"{self.server.url}/{name}/commit/1"}
        )

    def resolve(self, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=repository.sha)
        etag = hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else oid(content)
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=repository.sha, Accept_Ranges="none")


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(60)


def environment(hub: Hub, home: str, token: str = TOKEN) -> dict[str, str]:
    """What lets a process take this Hub for the real one, with a cache of its own. Xet, which uploads to a store of
    chunks beside the Hub, is turned off: the client then uploads by Git LFS."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": home,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
