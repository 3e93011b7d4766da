"""The SparkPost API, played by an HTTPS server of the tests' own: the request, every answer, and every failure."""

from __future__ import annotations

import io
import json
import os
import re
import select
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sparkpost  # type: ignore[import-untyped]
import trustme
from conftest import API_KEY, BOB, CAROL, STEVE, STEVET, Run, mail
from faulty import QUICK, patched
from pki import Authority
from readers import Openssl

Send = Callable[..., "subprocess.CompletedProcess[bytes]"]

PATH = "/api/v1/transmissions"
SENT, OK = b"may have been sent", b"OK"
ERROR = {"message": "Message told", "code": "1902", "description": "Description told"}
EVIL = f"before {API_KEY}\x1b]0;title\x07\x1b[2J\x9b31m\r\n\u202e\u2028\x00\ud800after"
DATED: dict[str, Any] = {"Date": "Mon, 24 Nov 2025 10:00:00 +0000", "Message_ID": "<one@thetucks.com>"}
THREE: dict[str, Any] = {"To": f"SteveT <{STEVET}>", "Cc": f"Bob <{BOB}>", "Bcc": CAROL}


class Request(NamedTuple):
    method: str
    path: str
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def recipients(self) -> list[str]:
        return [recipient["address"]["email"] for recipient in self.json["recipients"]]

    @property
    def message(self) -> bytes:
        return bytes(self.json["content"]["email_rfc822"], "utf-8")

    @property
    def entity(self) -> bytes:
        return self.message[self.message.index(b"Content-Type:") :]


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(Request(self.command, self.path, self.headers, body))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:
            self.server.stopped.wait(30)
        answer = answer or b""
        if self.close_connection and answer.startswith(b"HTTP/1.1 "):  # as the client must know before it sends more
            answer = answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        with suppress(OSError):  # the program need not read all
            self.wfile.write(answer)

    do_GET = do_POST

    def do_CONNECT(self) -> None:
        self.server.requests.append(Request(self.command, self.path, self.headers, b""))
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as upstream:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            other = {upstream: self.connection, self.connection: upstream}
            while ready := select.select(list(other), [], [], 30)[0]:
                for source in ready:
                    if not (data := source.recv(65536)):
                        return
                    other[source].sendall(data)

    def log_message(self, format: str, *values: object) -> None:
        pass


class StandIn(socketserver.ThreadingTCPServer):
    """Records requests and gives the answers in turn, the last one for ever; None is silence, b"" hangs up."""

    daemon_threads = True

    def __init__(self, certificate: trustme.LeafCert | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.deaf = False
        self.connections = 0
        self.requests: list[Request] = []
        self.answers: list[bytes | None] = [accepted(1)]
        self.stopped = threading.Event()
        self.port: int = self.server_address[1]
        self.url = f"{'https' if certificate else 'http'}://localhost:{self.port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.connections += 1
        return not self.deaf

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()


def reply(status: int, body: object, reason: str = "Reason", **headers: str) -> bytes:
    """An answer on the wire; a body that is not bytes is turned into JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    header = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    header |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in header.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def results(count: object, rejected: int = 0, *errors: dict[str, str]) -> dict[str, object]:
    answer = {"total_accepted_recipients": count, "total_rejected_recipients": rejected, "id": "11668787484950529"}
    return answer | ({"rcpt_to_errors": errors} if errors else {})


def accepted(count: int) -> bytes:
    return reply(200, {"results": results(count)})


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def ca_file(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def api(ca: trustme.CA) -> Iterator[StandIn]:
    with StandIn(ca.issue_cert("localhost")) as server:
        yield server


@pytest.fixture
def send(run: Run, api: StandIn, ca_file: str) -> Send:
    """Run the program with --send_api towards the stand-in; keywords are variables of its environment."""
    usual = {"SPARKPOST_API_KEY": API_KEY, "SPARKPOST_HOST": api.url, "SSL_CERT_FILE": ca_file, "data": mail()}
    return lambda *arguments, **variables: run("-", "--send_api", *arguments, **(usual | variables))


# ----------------------------------------------------------------------------------------- report and request


@pytest.mark.parametrize("host", ["https://localhost:{}", "localhost:{}"])
def test_the_report_is_word_for_word(host: str, send: Send, api: StandIn) -> None:
    done = send("--sign", "--encrypt", SPARKPOST_HOST=host.format(api.port))
    assert (done.returncode, done.stderr) == (0, b"")
    report = f'Opened API connection\nHost: https://localhost:{api.port}\nAPI key: "{"*" * 40}"\nSending: -\n'
    report += f"From: Steve <{STEVE}>\nTo: SteveT <{STEVET}>\nOK - in 0.0xx seconds\n"
    assert re.sub(r"0\.\d{3} ", "0.0xx ", done.stdout.decode()) == report


def test_the_request_is_the_public_clients(
    run: Run, send: Send, api: StandIn, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.answers = [accepted(3)]
    message = mail(**THREE, **DATED)
    assert send("--return_path", "bounces@thetucks.com", data=message).returncode == 0
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", ca_file)
    monkeypatch.setenv("no_proxy", "localhost")
    sparkpost.SparkPost(API_KEY, f"localhost:{api.port}").transmissions.send(
        recipients=[STEVET, BOB, CAROL],
        email_rfc822=run("-", data=message).stdout.decode(),
        track_opens=False,
        track_clicks=False,
        transactional=True,
        perform_substitutions=False,
        return_path="bounces@thetucks.com",
    )
    ours, theirs = api.requests
    assert ours.json == theirs.json
    assert (ours.method, ours.path) == (theirs.method, theirs.path) == ("POST", PATH)
    for name in ("Authorization", "Content-Type", "Host"):
        assert ours.headers[name] == theirs.headers[name]


def test_the_request_names_all_recipients_and_alters_nothing(send: Send, api: StandIn) -> None:
    api.answers = [accepted(3)]
    assert send(data=mail("Grüße\r\n".encode(), **THREE)).returncode == 0
    (request,) = api.requests
    assert request.headers["Authorization"] == API_KEY
    assert request.recipients == [STEVET, BOB, CAROL]
    options = {"open_tracking": False, "click_tracking": False, "perform_substitutions": False, "transactional": True}
    assert request.json["options"] == options
    assert "return_path" not in request.json
    assert request.message.startswith(f"From: Steve <{STEVE}>\r\nTo: SteveT <{STEVET}>\r\nSubject: ".encode())
    assert request.message.endswith("\r\n\r\nGrüße\r\n".encode())
    assert b"\nbcc:" not in request.message.lower()
    assert CAROL.encode() not in request.message


def test_the_return_path_is_the_bare_address(send: Send, api: StandIn) -> None:
    assert send("--return_path", "Bounces <bounces@bücher.example>").returncode == 0
    assert api.requests[0].json["return_path"] == "bounces@xn--bcher-kva.example"


def test_text_that_json_cannot_carry_is_refused(send: Send, api: StandIn) -> None:
    done = send(data=mail(b"Gr\xfc\xdfe\r\n"))
    assert done.returncode == 1
    assert b"--send_smtp" in done.stderr
    assert api.requests == []


@pytest.mark.parametrize("flags", [["--sign"], ["--encrypt"], ["--sign", "--encrypt"]], ids=" ".join)
def test_what_arrives_decrypts_and_verifies(
    flags: list[str], send: Send, api: StandIn, openssl: Openssl, authority: Authority
) -> None:
    assert send(*flags).returncode == 0
    entity = api.requests[0].entity
    if "--encrypt" in flags:
        assert b"Hello Steve" not in entity
        entity = openssl.decrypt(entity, authority.identity(STEVET))
    if "--sign" in flags:
        entity = openssl.verify(entity)
    assert entity == b"Content-Type: text/plain\r\n\r\nHello Steve\r\n"


def test_an_encrypted_message_goes_to_each_bcc_recipient_alone(
    send: Send, api: StandIn, openssl: Openssl, authority: Authority
) -> None:
    api.answers = [accepted(2), accepted(1)]
    done = send("--encrypt", data=mail(**THREE | {"Bcc": f"{CAROL}, {STEVE}"}))
    assert (done.returncode, done.stderr) == (0, b"")
    groups = [request.recipients for request in api.requests]
    assert groups == [[STEVET, BOB], [CAROL], [STEVE]]
    for request, group in zip(api.requests, groups, strict=True):
        assert b"\nbcc:" not in request.message.lower()
        for address in (STEVET, BOB, CAROL, STEVE):
            identity = authority.identity(address)
            if address in group:
                assert b"Hello Steve" in openssl.decrypt(request.entity, identity)
            else:
                with pytest.raises(AssertionError):
                    openssl.decrypt(request.entity, identity)


def test_a_bcc_copy_that_fails_does_not_hide_the_others(send: Send, api: StandIn) -> None:
    api.answers = [accepted(2), reply(503, {"errors": [ERROR]}), accepted(1)]
    done = send("--encrypt", data=mail(**THREE | {"Bcc": f"{CAROL}, {STEVE}"}))
    assert done.returncode == 1
    assert len(api.requests) == 3
    assert b"\nOK for 3 of 4 recipients - in " in done.stdout
    assert b"1902, Message told, Description told" in done.stderr


@pytest.mark.parametrize(("size", "code"), [(20_000_000, 0), (20_000_001, 1)])
def test_a_message_larger_than_the_api_takes_is_refused(size: int, code: int, send: Send, api: StandIn) -> None:
    header = mail(b"", Date="Fri, 01 Dec 2028 10:00:00 +0000", Message_ID="<1@thetucks.com>", MIME_Version="1.0")
    done = send(data=header + b"a" * (size - len(header)))
    assert (done.returncode, [len(each.message) for each in api.requests]) == (code, [size] * (not code))
    assert (b"use --send_smtp" in done.stderr) == bool(code)


# ------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("status", [400, 401, 403, 408, 413, 415, 420, 422, 429, 500, 503, 504])
def test_an_error_is_told_as_the_api_words_it(status: int, send: Send, api: StandIn) -> None:
    api.answers = [reply(status, {"errors": [ERROR, {"message": "Also told."}]})]
    done = send()
    assert done.returncode == (75 if status in (408, 420, 429) or status >= 500 else 1)
    assert b"1902, Message told, Description told" in done.stderr
    assert b"; Also told." in done.stderr
    assert (SENT in done.stderr) == (status == 504)
    assert OK not in done.stdout
    assert len(api.requests) == 1


def test_partial_acceptance_tells_who_was_refused_and_how_many_were_not(send: Send, api: StandIn) -> None:
    note = {"message": "transmission created, but with validation errors", "code": "2000"}
    api.answers = [reply(200, {"errors": [note], "results": results(2, 1, ERROR)})]
    done = send(data=mail(**THREE))
    assert done.returncode == 1
    assert b"2000, transmission created, but with validation errors" in done.stderr
    assert b"1902, Message told, Description told" in done.stderr
    assert re.search(rb"(?m)^OK for 2 of 3 recipients - in 0\.\d{3} seconds$", done.stdout)


@pytest.mark.parametrize("count", [0, -1, 2, True, None, [1]], ids=str)
@pytest.mark.parametrize("errors", [[], [ERROR]], ids=["no reasons", "reasons"])
def test_no_recipient_accepted_is_a_failure(
    count: object, errors: list[dict[str, str]], send: Send, api: StandIn
) -> None:
    api.answers = [reply(200, {"results": results(count, 1, *errors)})]
    done = send()
    assert done.returncode in ({1} if count == 0 else {1, 75})
    assert OK not in done.stdout
    assert done.stderr.strip(), "nothing says why"
    assert (b"1902, Message told, Description told" in done.stderr) == bool(errors)


@pytest.mark.parametrize(("status", "code"), [(200, 75), (202, 75), (400, 1), (503, 75)], ids=str)
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"<!DOCTYPE html><h1>Squid</h1><p>" + b"Cache access denied. " * 99, {"Content_Type": "text/html"}),
        (["errors"], {}),
        (None, {}),
        ({"errors": "none", "results": "none"}, {}),
        ({"errors": ["a", None, 1, []], "results": [{}]}, {}),
        (b"[" * 100_000, {}),
        (b'{"errors": ' + b"[" * 500_000, {}),
        (b"", {}),
        (b"\xff\xfe\x00", {}),
        (b'{"results": {"total_accepted_rec', {"Content_Length": "5000"}),
        (b'64\r\n{"results": {"total', {"Transfer_Encoding": "chunked"}),
        (b"-5\r\nhello\r\n0\r\n\r\n", {"Transfer_Encoding": "chunked"}),
        (b'{"errors": [{"message": "%b"}]}' % (b"x" * 20_000_000), {}),
    ],
    ids=[
        "html",
        "list",
        "null",
        "strings",
        "members",
        "brackets",
        "nested",
        "empty",
        "bytes",
        "cut",
        "chunk",
        "negative",
        "huge",
    ],
)
def test_an_unreadable_reply_is_a_clear_error(
    body: object, headers: dict[str, str], status: int, code: int, send: Send, api: StandIn
) -> None:
    api.answers = [reply(status, body, **headers)]
    done = send()
    assert done.returncode == code
    assert re.fullmatch(rb"sparkpostSMIME\.py: %b: [^\n]{10,300}\n" % api.url.encode(), done.stderr)
    assert str(status).encode() in done.stderr.replace(api.url.encode(), b"")
    assert (SENT in done.stderr) == (status in (200, 202))
    assert OK not in done.stdout


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_is_not_followed(status: int, send: Send, api: StandIn, ca: trustme.CA) -> None:
    with StandIn(ca.issue_cert("localhost")) as elsewhere:
        api.answers = [reply(status, b"", Location=elsewhere.url + PATH)]
        done = send()
        assert elsewhere.connections == 0
    assert len(api.requests) == 1
    assert done.returncode == 1
    assert str(status).encode() in done.stderr


@pytest.mark.parametrize(
    "answer",
    [
        reply(400, {"errors": [dict.fromkeys(ERROR, EVIL)]}),
        reply(200, {"results": results(0, 1, dict.fromkeys(ERROR, EVIL))}),
        reply(403, b"", reason=f"{API_KEY} \x1b[2J"),
        f"Authorization: {API_KEY} \x1b[2J\r\n\r\n".encode(),
        f"HTTP/{API_KEY} 200 \x1b[2J\r\n\r\n".encode(),
    ],
    ids=["error", "recipient", "reason", "no HTTP", "version"],
)
def test_neither_the_key_nor_control_characters_of_a_reply_are_printed(answer: bytes, send: Send, api: StandIn) -> None:
    api.answers = [answer]
    done = send()
    assert done.returncode in (1, 75)
    assert API_KEY.encode() not in done.stdout + done.stderr
    (line,) = done.stderr.decode().split("\n")[:-1]
    assert line.isprintable()


# --------------------------------------------------------------------------------------------------- connection


@pytest.mark.parametrize("host", ["https://localhost:1", "https://api.sparkpost.invalid"])
def test_a_server_that_is_not_there_is_temporary(host: str, send: Send) -> None:
    done = send(SPARKPOST_HOST=host, RES_OPTIONS="timeout:1 attempts:1")
    assert (done.returncode, done.stdout) == (75, b"")
    assert done.stderr.startswith(f"sparkpostSMIME.py: {host}: ".encode())
    assert SENT not in done.stderr


@pytest.mark.parametrize("heard", [False, True], ids=["before the request", "after the request"])
def test_a_dropped_connection_is_temporary_and_tells_what_may_have_been_sent(
    heard: bool, send: Send, api: StandIn
) -> None:
    api.deaf, api.answers = not heard, [b""]
    done = send()
    assert (done.returncode, api.connections, len(api.requests)) == (75, 1, heard)
    assert done.stderr.startswith(f"sparkpostSMIME.py: {api.url}: ".encode())
    assert (SENT in done.stderr) == heard


@pytest.mark.parametrize("heard", [False, True], ids=["before the handshake", "after the request"])
def test_a_silent_server_times_out(heard: bool, api: StandIn, ca_file: str, folder: Path) -> None:
    api.answers = [None]
    with socket.create_server(("127.0.0.1", 0)) as mute:
        host = api.url if heard else f"https://localhost:{mute.getsockname()[1]}"
        environment = {"SPARKPOST_API_KEY": API_KEY, "SPARKPOST_HOST": host, "SSL_CERT_FILE": ca_file}
        done = subprocess.run(
            [*patched(QUICK), "-", "--send_api"],
            input=mail(),
            env={"PATH": os.environ["PATH"], **environment},
            cwd=folder,
            capture_output=True,
            timeout=20,
        )
    assert done.returncode == 75
    assert re.fullmatch(rb"sparkpostSMIME\.py: %b: [^\n]*timed out[^\n]*\n" % host.encode(), done.stderr)
    assert (SENT in done.stderr) == heard


class Leisurely(Handler):
    """Rests while it reads a request, and before it answers."""

    def do_POST(self) -> None:
        whole, length = self.rfile, int(self.headers["Content-Length"])
        pieces = []
        while (missing := length - sum(map(len, pieces))) > 0:
            pieces.append(whole.read(min(missing, 2_000_000)))
            time.sleep(0.3)
        self.rfile = io.BytesIO(b"".join(pieces))
        time.sleep(1.5)
        super().do_POST()
        self.rfile = whole


def test_a_large_request_and_its_answer_may_take_long(folder: Path) -> None:
    with StandIn() as api:
        api.RequestHandlerClass = Leisurely
        api.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        data = mail(b"A line of text, which is as long as lines of text in a message mostly are.\r\n" * 160_000)
        done = subprocess.run(
            [*patched(QUICK), "-", "--send_api"],
            input=data,
            env={"PATH": os.environ["PATH"], "SPARKPOST_API_KEY": API_KEY, "SPARKPOST_HOST": api.url},
            cwd=folder,
            capture_output=True,
            timeout=30,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert api.requests[0].message.endswith(data[-1000:])
    taken = re.search(rb"OK - in (\d+\.\d+) seconds", done.stdout)
    assert taken
    assert float(taken[1]) > 2.5


@pytest.mark.parametrize("kind", ["unknown authority", "other host"])
def test_a_server_that_cannot_prove_its_name_gets_nothing(kind: str, send: Send, ca: trustme.CA) -> None:
    certificate = trustme.CA().issue_cert("localhost") if kind == "unknown authority" else ca.issue_cert("a.example")
    with StandIn(certificate) as impostor:
        done = send(SPARKPOST_HOST=impostor.url)
        assert (impostor.connections, impostor.requests) == (1, [])
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"certificate" in done.stderr
    assert SENT not in done.stderr


def test_the_proxy_of_the_environment_is_used_and_never_sees_the_key(send: Send, api: StandIn) -> None:
    with StandIn() as proxy:
        assert send(HTTPS_PROXY=proxy.url).returncode == 0
        (tunnel,) = proxy.requests
    assert (tunnel.method, tunnel.path) == ("CONNECT", f"localhost:{api.port}")
    assert tunnel.headers["Authorization"] is None
    assert api.requests[0].headers["Authorization"] == API_KEY


@pytest.mark.parametrize(
    "proxy", ["http://", "http:junk", "http://user:hunter2@localhost:port", "http://user:hunter2@localhost:1"]
)
def test_a_bad_proxy_is_a_clear_error(proxy: str, send: Send, api: StandIn) -> None:
    done = send(HTTPS_PROXY=proxy)
    assert done.returncode in (1, 75)
    assert done.stderr.startswith(b"sparkpostSMIME.py: ")
    assert SENT not in done.stderr
    assert b"hunter2" not in done.stderr
    assert api.connections == 0


@pytest.mark.parametrize("proxied", [False, True], ids=["alone", "beside a proxy"])
def test_plain_http_goes_to_loopback_and_never_through_a_proxy(proxied: bool, send: Send) -> None:
    with StandIn() as plain, StandIn() as proxy:
        done = send(SPARKPOST_HOST=plain.url, **({"http_proxy": proxy.url} if proxied else {}))
        assert proxy.connections == 0
        assert [(request.path, request.headers["Authorization"]) for request in plain.requests] == [(PATH, API_KEY)]
    assert done.returncode == 0


# ----------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("key", [f"{API_KEY}\n", f"{API_KEY}\r\nX-Evil: 1", f"{API_KEY}é", f"\t{API_KEY}"], ids=ascii)
def test_a_key_that_no_header_can_carry_is_refused(key: str, send: Send, api: StandIn) -> None:
    done = send(SPARKPOST_API_KEY=key)
    assert done.returncode == 1
    assert re.fullmatch(rb"sparkpostSMIME\.py: SPARKPOST_API_KEY [^\n]+\n", done.stderr)
    assert API_KEY.encode() not in done.stderr
    assert api.connections == 0


def test_a_missing_key_is_told_before_anything_else(run: Run, api: StandIn) -> None:
    done = run("absent.eml", "--sign", "--send_api", SPARKPOST_HOST=api.url)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"Environment var SPARKPOST_API_KEY not set - stopping\n"


@pytest.mark.parametrize(
    "host", ["http://api.sparkpost.com", "ftp://localhost", "a..b", "x" * 64, "localhost:99999", "localhost/api", "a b"]
)
def test_a_host_that_is_none_is_a_clear_error(host: str, send: Send) -> None:
    done = send(SPARKPOST_HOST=host)
    assert done.returncode == 1
    assert done.stderr.startswith(b"sparkpostSMIME.py: ")
    assert b"SPARKPOST_HOST" in done.stderr
    assert SENT not in done.stderr
