"""A web server on a free port of the loopback interface, in a thread of the test's process."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def web_server(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve until the context ends; yields ``HOST:PORT``."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()
