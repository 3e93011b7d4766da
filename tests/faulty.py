"""SMTP servers on loopback for the tests: one that misbehaves as a test asks, and aiosmtpd, which behaves.

Both write down what they take, and the fixtures that start them stop them.
"""

from __future__ import annotations

import base64
import re
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from aiosmtpd.controller import Controller
from conftest import PASSWORD, SCRIPT, Run, mail
from servers import free_port, wait_for


class Fault(Enum):
    DROP = "closes the connection"
    SILENCE = "never answers"
    ENDLESS = "answers with a line that does not end"


class LastWord(str):
    """An answer after which the connection is closed."""


Answer = str | Fault | Callable[[str], str | Fault]  # a function makes the answer from what it answers
ANSWERS: Mapping[str, Answer] = {
    "connect": "220 mx.tests.example ESMTP",
    "HELO": "250 mx.tests.example",
    "STARTTLS": "220 2.0.0 go ahead",
    "AUTH": "235 2.7.0 welcome",
    "MAIL": "250 2.1.0 ok",
    "RCPT": "250 2.1.5 ok",
    "DATA": "354 end with a dot",
    "dot": "250 2.0.0 queued",
    "RSET": "250 2.0.0 ok",
    "QUIT": "221 2.0.0 bye",
    "": "500 5.5.2 unknown command",
}


def sometimes(answer: str | Fault, when: Callable[[int], bool]) -> Answer:
    """This answer where `when` says so of its number, which begins at 1; else the good one."""
    numbers = count(1)
    good = {stage.lower(): text for stage, text in ANSWERS.items() if isinstance(text, str)}
    return lambda stage: answer if when(next(numbers)) else good[stage.lower().split(" ")[0]]


class Mail(NamedTuple):
    """A message as the server took it; the content still has the dots that stuff it."""

    sender: str
    options: str
    recipients: list[str]
    content: bytes


class Dialogue(socketserver.BaseRequestHandler):
    """One connection."""

    server: Faulty

    def setup(self) -> None:
        self.server.busy += 1
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.secure, self.awaited = False, ""
        self.stream = self.request.makefile("rb")

    def finish(self) -> None:
        with suppress(OSError):
            self.stream.close()
            self.request.close()
        self.server.busy -= 1

    def handle(self) -> None:
        """Answer line by line until either side ends it."""
        mail = Mail("", "", [], b"")
        begun: bool | None = None  # whether MAIL was accepted
        with suppress(OSError):
            self.answer("connect")
            while line := self.hear():
                text = line.decode(errors="replace").rstrip("\r\n")
                if (begun is False and text[:4].upper() in ("RCPT", "DATA")) or (begun and text[:4].upper() == "MAIL"):
                    self.request.sendall(b"503 5.5.1 not now\r\n")
                    continue
                good = self.answer(self.awaited + text)
                if found := re.fullmatch(r"MAIL FROM:<(.*)>((?: [^<>]+)?)", text, re.IGNORECASE):
                    mail, begun = Mail(found[1], found[2], [], b""), good
                elif good and (found := re.fullmatch(r"RCPT TO:<(.*)>", text, re.IGNORECASE)):
                    mail.recipients.append(found[1])
                elif good and text.upper() == "STARTTLS":
                    self.encrypt()
                elif good and text.upper() == "DATA":
                    self.server.mails.append(mail._replace(content=self.take_content()))
                    begun = None
                    self.answer("dot")
                elif text.upper() == "RSET":
                    begun = None
                elif text.upper() == "QUIT":
                    break

    def hear(self) -> bytes:
        line: bytes = self.stream.readline()
        self.server.lines.append((self.secure, line))
        return line

    def answer(self, stage: str) -> bool:
        """Answer as the test asks; whether the answer lets the client go on."""
        answers = self.server.answers.items()
        answer = next(answer for key, answer in answers if stage.lower().startswith(key.lower()))
        reply = answer if isinstance(answer, str | Fault) else answer(stage)
        if reply is Fault.SILENCE:
            self.stream.read()  # until the client goes
        while reply is Fault.ENDLESS:
            self.request.sendall(b"2" * 65536)
        if isinstance(reply, Fault):
            raise ConnectionAbortedError
        self.awaited = "response " if reply.startswith("334") else ""
        self.request.sendall(reply.encode() + b"\r\n")
        if isinstance(reply, LastWord):
            raise ConnectionAbortedError
        return reply.startswith("354" if stage.upper() == "DATA" else "2")

    def encrypt(self) -> None:
        if "handshake" in self.server.answers or not self.server.tls:
            raise ConnectionAbortedError
        self.stream.close()
        self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        self.stream, self.secure = self.request.makefile("rb"), True

    def take_content(self) -> bytes:
        lines = []
        while (line := self.hear()) != b".\r\n":
            if not line or "body" in self.server.answers:
                raise ConnectionAbortedError
            lines.append(line)
            if len(lines) % self.server.lines_in_a_row == 0:
                time.sleep(0.3)
        return b"".join(lines)


class Faulty(socketserver.ThreadingTCPServer):
    """Answers each line as `answers` says, which are named by the start of the line, else as a good server does.

    Stages without a line of their own: "connect", "handshake" and "body" (DROP only), "dot", "response" to a 334.
    """

    daemon_threads = True

    def __init__(
        self, answers: Mapping[str, Answer], extensions: Sequence[str] = (), tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), Dialogue)
        self.port = self.server_address[1]
        self.tls, self.busy, self.lines_in_a_row = tls, 0, 1 << 30  # of a message, that are read without a rest
        self.lines: list[tuple[bool, bytes]] = []  # whether under TLS, and what the client said
        self.mails: list[Mail] = []
        offers = ["mx.tests.example", *extensions, *(["STARTTLS"] if tls else [])]
        hello = "".join(f"250-{offer}\r\n" for offer in offers) + "250 HELP"
        self.answers = {**answers, "EHLO": answers.get("EHLO", hello)}
        self.answers |= {stage: answer for stage, answer in ANSWERS.items() if stage not in answers}

    @property
    def heard(self) -> bytes:
        """All that clients said, once they are gone."""
        wait_for(lambda: not self.busy)
        return b"".join(line for _, line in self.lines)


class Mailbox(Controller):
    """aiosmtpd, keeping what it takes; refuses the recipients in `refusals`."""

    def __init__(self, **options: Any) -> None:
        self.mails: list[Any] = []
        self.refusals: dict[str, str] = {}
        super().__init__(self, "127.0.0.1", free_port(), server_hostname="mx.tests.example", **options)

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if address in self.refusals:
            return self.refusals[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.mails.append(envelope)
        return "250 OK"


class Outcome(NamedTuple):
    """What the program did."""

    code: int
    out: str
    err: str


Serve = Callable[..., Faulty]
Open = Callable[..., Mailbox]
Send = Callable[..., Outcome]

LOADER = """
import importlib.util, socket, sys
specification = importlib.util.spec_from_file_location("program", {script!r})
sys.modules["program"] = program = importlib.util.module_from_spec(specification)
specification.loader.exec_module(program)
{patch}
sys.exit(program.main())
"""
QUICK = """
assert (program.TIMEOUT, program.FINAL_TIMEOUT) == (60, 600)
program.TIMEOUT, program.FINAL_TIMEOUT = 1, 3
"""
ABROAD = "assert program.is_loopback('127.0.0.1'); program.is_loopback = lambda host: False"


def patched(patch: str) -> list[str]:
    """The command that runs the program after this patch of it."""
    return [sys.executable, "-c", LOADER.format(script=str(SCRIPT), patch=patch)]


def redirected(port: int) -> str:
    """A patch that connects to this port on loopback, whatever the host."""
    return f"""
connect = socket.create_connection
socket.create_connection = lambda address, *rest, **named: connect(("127.0.0.1", {port}), *rest, **named)
"""


@pytest.fixture(name="serve")
def start_faulty() -> Iterator[Serve]:
    """Start a server that answers so, and offers these extensions."""
    with ExitStack() as stack:

        def serve(
            answers: Mapping[str, Answer] | None = None, *extensions: str, tls: ssl.SSLContext | None = None
        ) -> Faulty:
            server = stack.enter_context(Faulty(answers or {}, extensions, tls))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
            return server

        yield serve


@pytest.fixture(name="open_mailbox")
def start_mailbox() -> Iterator[Open]:
    """Start aiosmtpd with these options."""
    with ExitStack() as stack:

        def open_mailbox(**options: Any) -> Mailbox:
            mailbox = Mailbox(**options)
            mailbox.start()
            stack.callback(mailbox.stop)
            return mailbox

        yield open_mailbox


@pytest.fixture(name="send")
def send_by_smtp(run: Run, folder: Path) -> Send:
    """Send a message to a server, after a patch of the program where one is given; no output holds a secret."""

    def send(
        server: Faulty | Mailbox, data: bytes = mail(), *arguments: str, patch: str = "", **variables: str
    ) -> Outcome:
        variables = {"SMTP_HOST": "localhost", "SMTP_PORT": str(server.port)} | variables
        arguments = ("-", "--send_smtp", *arguments)
        if not patch:
            done = run(*arguments, data=data, **variables)
        else:
            words = [*patched(patch), *arguments]
            done = subprocess.run(words, cwd=folder, env=variables, input=data, capture_output=True, timeout=30)
        outcome = Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
        for unwanted in ("Traceback", PASSWORD, base64.b64encode(PASSWORD.encode()).decode()):
            assert unwanted not in outcome.out + outcome.err, outcome
        return outcome

    return send


@pytest.fixture(name="tls_authority", scope="session")
def make_tls_authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(name="ca_file")
def write_ca_file(tls_authority: trustme.CA, tmp_path: Path) -> str:
    """A file with the certificate of the authority that `certified` uses."""
    tls_authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


@pytest.fixture(name="certified", scope="session")
def make_certified(tls_authority: trustme.CA) -> Callable[[str], ssl.SSLContext]:
    """A server's TLS with a certificate for this host."""

    def certified(host: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls_authority.issue_cert(host).configure_cert(context)
        return context

    return certified
