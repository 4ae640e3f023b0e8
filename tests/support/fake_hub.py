"""A Hub on this machine: as much of its HTTP interface as `huggingface_hub` needs to make a repository and commit files."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Commit:
    """One commit: its message, the token that made it, and the files that came with it."""

    repository: str
    message: str
    token: str
    files: dict[str, bytes]


@dataclass
class FakeHub:
    """What was asked of the Hub. address: its endpoint, once it listens."""

    address: str = ""
    repositories: list[dict[str, Any]] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def content(self) -> dict[str, bytes]:
        """The repository's files after all commits."""
        return {name: data for commit in self.commits for name, data in commit.files.items()}

    def start(self) -> ThreadingHTTPServer:
        """Listen on a free port, in a thread."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, data: Any, status: int = 200) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer({"error": f"not known here: {self.path}"}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            hub.tokens.add(token)
            path = self.path.split("?")[0]
            if path == "/api/repos/create":
                asked = json.loads(body)
                hub.repositories.append(asked)
                name = f"{asked.get('organization') or 'me'}/{asked['name'].rpartition('/')[2]}"
                self.answer({"url": f"{hub.address}/{name}", "name": name, "id": "1"})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
            elif "/commit/" in path:
                lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
                header = next(x["value"] for x in lines if x["key"] == "header")
                name = path.removeprefix("/api/models/").partition("/commit/")[0]
                hub.commits.append(Commit(name, header["summary"], token, files))
                number = f"{len(hub.commits):040x}"
                self.answer({"commitUrl": f"{hub.address}/{name}/commit/{number}", "commitOid": number, "success": True})
            else:
                self.answer({"error": f"not known here: {path}"}, 404)

    return Handler
