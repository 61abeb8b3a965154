"""A server on this machine that answers as the Hugging Face Hub does for one repository, for the Hub's real client."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_repository(folder: Path) -> Iterator[str]:
    """The files of ``folder`` are the repository, whatever it is called. Gives the server's URL."""

    def answer(url: str) -> bytes:
        if f"/resolve/{COMMIT}/" in url:
            return (folder / url.rpartition("/")[2]).read_bytes()
        files = sorted(folder.iterdir())
        if "/tree/" in url:
            tree = [
                {"type": "file", "path": f.name, "oid": f.name, "size": f.stat().st_size}
                for f in files
            ]
            return json.dumps(tree).encode()
        about: dict[str, Any] = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}  # fmt: skip
        return json.dumps(about).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answer(self.path)
            self.send_response(200)
            self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
