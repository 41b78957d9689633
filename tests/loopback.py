"""A server of the standard library on 127.0.0.1 while a block runs, for the stubs of reward servers, judges and hubs."""

import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that hung up is what these tests are about."""


@contextmanager
def listening(handler):
    """The address, without a path, that `handler` (a class of BaseHTTPRequestHandler) answers at until the block ends."""
    server = Quiet(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
