"""Servers on loopback that take all messages: Postfix's smtp-sink, the API's stand-in; and a long way to either."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import SimpleQueue
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

from cryptography.x509 import DNSName
from pki import Authority, certificate_pem, certify, distinguished_name, key_pem, new_key
from servers import free_port, listening, wait_for


class SmtpSink:
    """Postfix's own, written in C; it shares the processors with the program, so it tells how much it takes."""

    def __init__(self) -> None:
        self.port = free_port()
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen(["smtp-sink", "-4", *user, f"127.0.0.1:{self.port}", "100"])
        wait_for(lambda: listening(self.port))

    @property
    def cpu(self) -> float:
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e9

    def stop(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.wait()


class Server(ThreadingTCPServer):
    """A server in this process, in threads that end with it."""

    daemon_threads = True

    def __init__(self, handler: Any, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.port: int = self.server_address[1]
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class ApiHandler(BaseHTTPRequestHandler):
    """Accepts all recipients and keeps the connection."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_POST(self) -> None:
        count = self.rfile.read(int(self.headers["Content-Length"])).count(b'"address":')
        body = b'{"results": {"total_rejected_recipients": 0, "total_accepted_recipients": %d, "id": "1"}}' % count
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    def log_message(self, format: str, *values: object) -> None:
        pass


def api_server(folder: Path, authority: Authority) -> Server:
    """The API on localhost; the CA that vouches for it is in root.pem."""
    name, key, issuer = distinguished_name("API"), new_key("P-256"), authority.intermediate
    certificate = certify(name, key, issuer.subject, authority.intermediate_key, names=[DNSName("localhost")])
    chain = folder / "api.pem"
    chain.write_bytes(key_pem(key) + certificate_pem(certificate) + certificate_pem(issuer))
    (folder / "root.pem").write_bytes(certificate_pem(authority.root))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return Server(ApiHandler, context)


def proxy_server(port: int, delay: float) -> Server:
    """A way to this port that takes so many seconds more each way, however much is under way."""
    return Server(partial(ProxyHandler, port, delay))


class ProxyHandler(BaseRequestHandler):
    def __init__(self, port: int, delay: float, *given: Any) -> None:
        self.port, self.delay = port, delay
        super().__init__(*given)

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as server, suppress(OSError):
            for each in (self.request, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self.carry, args=(server, self.request), daemon=True)
            back.start()
            self.carry(self.request, server)
            back.join()

    def carry(self, source: socket.socket, target: socket.socket) -> None:
        pieces: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
        threading.Thread(target=self.take, args=(source, pieces), daemon=True).start()
        piece = b"-"
        while piece:
            due, piece = pieces.get()
            time.sleep(max(0, due - time.monotonic()))
            with suppress(OSError):  # who has hung up wants no more
                target.sendall(piece) if piece else target.shutdown(socket.SHUT_WR)

    def take(self, source: socket.socket, pieces: SimpleQueue[tuple[float, bytes]]) -> None:
        piece = b"-"
        while piece:
            try:
                piece = source.recv(65536)
            except OSError:
                piece = b""
            pieces.put((time.monotonic() + self.delay, piece))
