"""A stand-in for the server of Weights & Biases: as much of it as wandb 0.31 asks for when a run starts and is told."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "somebody"


@dataclass
class StoredRun:
    """What the server knows of one run: the groups that it was said to be in, its history's lines by their number."""

    groups: set[str] = field(default_factory=set)
    config: str = "{}"
    is_finished: bool = False
    history: dict[int, dict[str, Any]] = field(default_factory=dict)

    def last_line(self) -> dict[str, Any]:
        return self.history[max(self.history)] if self.history else {}


class WandbServer(ThreadingHTTPServer):
    """Runs by id. What it does not know it answers with an error, as an older server would."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, StoredRun] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that is dropped, as by a process that ends, is no fault; anything else is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, query: str, values: dict[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL query, known by what it asks for; None for one that is not known."""
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        if "viewer" in query:
            viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
            return {"viewer": viewer | {"teams": {"edges": []}}}
        if "upsertBucket" in query:
            return {"upsertBucket": self._start(values)}
        if "bucket(name: $name, missingOk: true)" in query:
            return {"model": self._resume_status(values["name"])}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in values["files"]]
            return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}
        return None

    def stream(self, run_id: str, told: dict[str, Any]) -> None:
        """Take lines of a run's history, each at its place."""
        run = self.runs[run_id]
        lines = told.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(lines["content"], lines["offset"]):
            run.history[number] = json.loads(line)
        run.is_finished |= told.get("complete", False)

    def _start(self, values: dict[str, Any]) -> dict[str, Any]:
        is_new = values["name"] not in self.runs
        run = self.runs.setdefault(values["name"], StoredRun())
        run.config = values["config"] or run.config
        run.groups |= {values["groupName"]} - {None}
        project = {"id": "2", "name": values["project"], "entity": {"id": "3", "name": ENTITY}}
        bucket = {"id": "4", "name": values["name"], "displayName": values["displayName"], "description": None}
        bucket |= {"config": run.config, "sweepName": None, "project": project, "historyLineCount": len(run.history)}
        return {"bucket": bucket, "inserted": is_new}

    def _resume_status(self, run_id: str) -> dict[str, Any]:
        run = self.runs.get(run_id)
        model = {"id": "2", "name": "project", "entity": {"id": "3", "name": ENTITY}, "bucket": None}
        if run is None:
            return model
        tail = json.dumps([json.dumps(run.last_line())])
        bucket = {"id": "4", "name": run_id, "displayName": run_id, "summaryMetrics": json.dumps(run.last_line())}
        bucket |= {"logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0}
        bucket |= {"historyTail": tail, "eventsTail": "[]", "config": run.config, "tags": [], "notes": None}
        return model | {"bucket": bucket | {"wandbConfig": json.dumps({"t": 1})}}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        with self.server.lock:
            if self.path == "/graphql":
                asked = json.loads(body)
                data = self.server.answer(asked["query"], asked.get("variables") or {})
                answer = {"errors": [{"message": "This server does not know it."}]} if data is None else {"data": data}
            elif self.path.endswith("/file_stream"):
                self.server.stream(self.path.split("/")[-2], json.loads(body))
        self._send(answer)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self._send({})

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _send(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", f"{len(body)}")
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """The server while it runs."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
