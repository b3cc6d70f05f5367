"""Google Cloud Storage in this process: objects in a dictionary, behind fsspec for epath, behind HTTP for TensorStore.

What Orbax asks google-cloud-storage (which gcsfs brings), whether a bucket has real folders, is answered with no.
"""

import contextlib
import functools
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from orbax.checkpoint._src.path import gcs_utils


class Bucket(MemoryFileSystem):
    """gs:// paths in memory; directories are, as there, only what the names of objects say."""

    protocol = "gs"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/") if str(path).strip("/") else ""

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    """What TensorStore asks of the JSON interface: read, write, delete and list objects."""

    def log_message(self, *_):
        pass

    def _reply(self, code, content=b"{}", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    @property
    def _asked(self):
        url = urllib.parse.urlsplit(self.path)
        bucket, _, name = re.search(r"/b/([^/]+)/o(/(.*))?$", url.path).groups()
        return bucket, urllib.parse.unquote(name or ""), dict(urllib.parse.parse_qsl(url.query))

    def do_GET(self):
        bucket, name, query = self._asked
        if not name:
            self._list(bucket, query)
            return
        file = Bucket.store.get(f"/{bucket}/{name}")
        if file is None:
            self._reply(404)
            return
        content, code = file.getvalue(), 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            part, code = content[first : last + 1], 206
            kind = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            self._reply(code, part, X_Goog_Generation=_generation(content), Content_Range=kind)
            return
        self._reply(code, content, X_Goog_Generation=_generation(content))

    def _list(self, bucket, query):
        prefix = f"/{bucket}/{query.get('prefix', '')}"
        first = f"/{bucket}/{query.get('startOffset', '')}"
        last = f"/{bucket}/{query.get('endOffset', chr(0xFFFF))}"
        names = sorted(name for name in Bucket.store if name.startswith(prefix) and first <= name < last)
        items = [{"name": name.removeprefix(f"/{bucket}/"), "size": str(Bucket.store[name].size)} for name in names]
        self._reply(200, json.dumps({"items": items}).encode())

    def do_POST(self):
        bucket, _, query = self._asked
        content = self.rfile.read(int(self.headers["Content-Length"]))
        Bucket().pipe_file(f"gs://{bucket}/{query['name']}", content)
        said = {"name": query["name"], "generation": _generation(content), "size": str(len(content))}
        self._reply(200, json.dumps(said).encode())

    def do_DELETE(self):
        bucket, name, _ = self._asked
        self._reply(204 if Bucket.store.pop(f"/{bucket}/{name}", None) else 404, b"")


def _generation(content):
    return str(int(hashlib.sha256(content).hexdigest()[:12], 16) + 1)


@contextlib.contextmanager
def fake_bucket(monkeypatch):
    """gs:// leads here, for epath and TensorStore, and anything that was there is gone."""
    Bucket.store.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.05), daemon=True)
    thread.start()
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: Bucket())
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    try:
        yield Bucket.store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
