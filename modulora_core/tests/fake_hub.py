"""Serve one repository on this machine to the Hugging Face Hub's real client."""

import http.server
import json
import threading
from contextlib import contextmanager

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_repository(folder):
    """Serve the files of ``folder`` under any repository name. Gives the server's URL."""

    def answer(url):
        if f"/resolve/{COMMIT}/" in url:
            return (folder / url.rpartition("/")[2]).read_bytes()
        files = sorted(folder.iterdir())
        if "/tree/" in url:
            tree = [
                {"type": "file", "path": file.name, "oid": file.name, "size": file.stat().st_size}
                for file in files
            ]
            return json.dumps(tree).encode()
        siblings = [{"rfilename": file.name} for file in files]
        about = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
        return json.dumps(about).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = answer(self.path)
            self.send_response(200)
            self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
