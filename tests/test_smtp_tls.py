"""STARTTLS and the login: what is verified, and where a password never goes."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PASSWORD, STEVE, TESTS, mail
from faulty import (  # the fixtures among them are used by name
    ABROAD,
    Answer,
    Fault,
    Faulty,
    Open,
    Send,
    Serve,
    make_certified,  # noqa: F401
    make_tls_authority,  # noqa: F401
    redirected,
    send_by_smtp,  # noqa: F401
    start_faulty,  # noqa: F401
    start_mailbox,  # noqa: F401
    write_ca_file,  # noqa: F401
)

Certified = Callable[[str], ssl.SSLContext]
USER = "SMTP_Injection"
LOGIN = {"SMTP_USER": USER, "SMTP_PASSWORD": PASSWORD}


def base64_of(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


PLAIN_LOGIN = base64_of(f"\0{USER}\0{PASSWORD}")


def heard_password(server: Faulty) -> bool:
    """Whether the password crossed the wire, as it is or within base64."""
    return any(PASSWORD.encode() in text for word in server.heard.split() for text in (word, decoded(word)))


def decoded(word: bytes) -> bytes:
    """What base64 holds; nothing, if it is none."""
    with suppress(ValueError):
        return base64.b64decode(word + b"==")
    return b""


# ---------------------------------------------------------------------------------------------------- STARTTLS


def test_report_is_that_of_the_mission_document(send: Send, serve: Serve, certified: Certified, ca_file: str) -> None:
    host = "smtp.sparkpostmail.com"
    server = serve({}, "AUTH PLAIN LOGIN", tls=certified(host))
    data = (TESTS / "fancy-HTML-to-smt.eml").read_bytes()
    settings = LOGIN | {"SMTP_HOST": host, "SMTP_PORT": "587", "SMTP_CA_FILE": ca_file}
    outcome = send(server, data, "--sign", "--encrypt", patch=redirected(server.port) + ABROAD, **settings)
    report, _, _ = outcome.out.rpartition("OK - in ")
    assert report == (
        "Opened SMTP connection (STARTTLS)\n"
        "Host: smtp.sparkpostmail.com\n"
        "Port: 587\n"
        'User: "SMTP_Injection"\n'
        'Password: "****************************************"\n'
        "Sending: -\n"
        "From: Steve <steve@thetucks.com>\n"
        "To: SteveT <steve.tuck@sparkpost.com>\n"
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert heard_password(server)
    assert [line for secure, line in server.lines if not secure][1:] == [b"STARTTLS\r\n"]


def test_verified_certificate_is_reported(send: Send, open_mailbox: Open, certified: Certified, ca_file: str) -> None:
    mailbox = open_mailbox(tls_context=certified("localhost"), require_starttls=True)
    outcome = send(mailbox, SMTP_CA_FILE=ca_file, SMTP_TLS="verify")
    assert outcome.out.startswith("Opened SMTP connection (STARTTLS)\n")
    assert (outcome.code, len(mailbox.mails)) == (0, 1)


def test_unknown_certificate_is_accepted_without_a_password(
    send: Send, open_mailbox: Open, certified: Certified
) -> None:
    mailbox = open_mailbox(tls_context=certified("localhost"), require_starttls=True)
    outcome = send(mailbox)
    assert outcome.out.startswith("Opened SMTP connection (STARTTLS, certificate not verified)\n")
    assert (outcome.code, len(mailbox.mails)) == (0, 1)


def test_unknown_certificate_is_refused_where_verification_is_demanded(
    send: Send, serve: Serve, certified: Certified
) -> None:
    server = serve(tls=certified("localhost"))
    outcome = send(server, SMTP_TLS="verify")
    assert "localhost: its certificate cannot be verified: " in outcome.err
    assert "SMTP_CA_FILE" in outcome.err
    assert (outcome.code, outcome.out) == (1, "")
    assert b"mail from" not in server.heard.lower()


def test_server_without_starttls_is_refused_where_verification_is_demanded(send: Send, serve: Serve) -> None:
    server = serve()
    outcome = send(server, SMTP_TLS="verify")
    assert "localhost does not offer STARTTLS" in outcome.err
    assert (outcome.code, outcome.out) == (1, "")
    assert b"mail from" not in server.heard.lower()


def test_certificate_for_another_host_is_not_verified(
    send: Send, serve: Serve, certified: Certified, ca_file: str
) -> None:
    server = serve(tls=certified("mail.example.com"))
    outcome = send(server, SMTP_CA_FILE=ca_file)
    assert "not valid for 'localhost'" in outcome.err
    assert (outcome.code, server.mails) == (1, [])


def test_tls_turned_off_stays_plain(send: Send, serve: Serve, certified: Certified) -> None:
    server = serve(tls=certified("localhost"))
    outcome = send(server, SMTP_TLS="off")
    assert outcome.out.startswith("Opened SMTP connection (plain)\n")
    assert len(server.mails) == 1
    assert b"starttls" not in server.heard.lower()


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_unusable_ca_file_is_named(
    content: bytes | None, send: Send, serve: Serve, certified: Certified, folder: Path
) -> None:
    if content is not None:
        (folder / "own-ca.pem").write_bytes(content)
    server = serve(tls=certified("localhost"))
    outcome = send(server, SMTP_CA_FILE="own-ca.pem")
    assert outcome.err.startswith("sparkpostSMIME.py: SMTP_CA_FILE own-ca.pem: ")
    assert (outcome.code, server.mails) == (1, [])


@pytest.mark.parametrize(
    ("answers", "printed", "code"),
    [
        ({"STARTTLS": "454 4.7.0 TLS not available"}, "(454, b'4.7.0 TLS not available')", 75),
        ({"STARTTLS": "554 5.7.3 no"}, "(554, b'5.7.3 no')", 1),
        ({"STARTTLS": Fault.DROP}, "sparkpostSMIME.py: localhost port ", 75),
        ({"handshake": Fault.DROP}, "sparkpostSMIME.py: localhost port ", 75),
    ],
)
def test_failed_starttls_is_no_reason_to_send_plainly(
    answers: dict[str, Answer], printed: str, code: int, send: Send, serve: Serve, certified: Certified
) -> None:
    server = serve(answers, tls=certified("localhost"))
    outcome = send(server)
    assert outcome.err.startswith(printed)
    assert (outcome.code, outcome.out, server.mails) == (code, "", [])


def test_extensions_offered_under_tls_are_used(send: Send, serve: Serve, certified: Certified, ca_file: str) -> None:
    server = serve({}, "8BITMIME", "SMTPUTF8", tls=certified("localhost"))
    outcome = send(server, mail("Grüße\r\n".encode()), SMTP_CA_FILE=ca_file)
    assert (outcome.code, server.mails[0].options) == (0, " BODY=8BITMIME")
    outcome = send(server, mail(To="jörg@example.com"), SMTP_CA_FILE=ca_file)
    assert (outcome.code, outcome.err) == (0, "")
    assert server.mails[1].recipients == ["jörg@example.com"]
    assert "SMTPUTF8" in server.mails[1].options


def test_extensions_offered_before_tls_alone_are_not_believed(
    send: Send, serve: Serve, certified: Certified, ca_file: str
) -> None:
    hello = iter(["250-mx\r\n250-SMTPUTF8\r\n250-AUTH PLAIN\r\n250 STARTTLS", "250 mx"])
    server = serve({"EHLO": lambda line: next(hello)}, tls=certified("localhost"))
    outcome = send(server, mail(), SMTP_CA_FILE=ca_file, **LOGIN)
    assert "AUTH" in outcome.err
    assert outcome.code == 1
    assert not heard_password(server)


# ------------------------------------------------------------------------- a password for a server that is far away


@pytest.mark.parametrize("tls", ["auto", "verify", "off"])
def test_password_is_not_sent_without_starttls(tls: str, send: Send, serve: Serve) -> None:
    server = serve({}, "AUTH PLAIN LOGIN")
    outcome = send(server, patch=ABROAD, SMTP_TLS=tls, **LOGIN)
    assert (outcome.code, outcome.out) == (1, "")
    assert "localhost" in outcome.err
    assert b"auth" not in server.heard.lower()
    assert not heard_password(server)


@pytest.mark.parametrize("tls", ["auto", "verify"])
@pytest.mark.parametrize("host", ["localhost", "mail.example.com"])
def test_password_is_not_sent_under_a_certificate_that_cannot_be_verified(
    tls: str, host: str, send: Send, serve: Serve, certified: Certified, ca_file: str
) -> None:
    server = serve({}, "AUTH PLAIN", tls=certified(host))
    settings = LOGIN | ({"SMTP_CA_FILE": ca_file} if host != "localhost" else {})
    outcome = send(server, patch=ABROAD, SMTP_TLS=tls, **settings)
    assert "certificate cannot be verified" in outcome.err
    assert (outcome.code, outcome.out) == (1, "")
    assert b"auth" not in server.heard.lower()


def test_password_is_not_sent_where_tls_is_turned_off(send: Send, serve: Serve, certified: Certified) -> None:
    server = serve({}, "AUTH PLAIN", tls=certified("localhost"))
    outcome = send(server, patch=ABROAD, SMTP_TLS="off", **LOGIN)
    assert "a password is not sent over a plain connection" in outcome.err
    assert outcome.code == 1
    assert not heard_password(server)


def test_second_connection_is_as_far_away_as_it_is(send: Send, serve: Serve, certified: Certified) -> None:
    """The certificate is refused at a loopback address; then the name leads elsewhere, as a false DNS can make it."""
    server = serve({}, "AUTH PLAIN", tls=certified("localhost"))
    patch = (
        "connections, greet = [], program.greet\n"
        "program.greet = lambda settings: connections.append(1) or greet(settings)\n"
        "program.is_loopback = lambda host: len(connections) < 2"
    )
    outcome = send(server, patch=patch, **LOGIN)
    assert not heard_password(server)
    assert outcome.code == 1


def test_user_without_password_sends_to_anywhere_without_login(send: Send, serve: Serve) -> None:
    server = serve({}, "AUTH PLAIN")
    outcome = send(server, patch=ABROAD, SMTP_USER=USER)
    assert f'\nUser: "{USER}"\nPassword: ""\n' in outcome.out
    assert outcome.code == 0
    assert b"auth" not in server.heard.lower()


def test_password_without_user_is_not_sent(send: Send, serve: Serve) -> None:
    server = serve({"MAIL": "530 5.7.1 Authorization required."}, "AUTH PLAIN")
    outcome = send(server, patch=ABROAD, SMTP_PASSWORD=PASSWORD)
    assert outcome.err == f"(530, b'5.7.1 Authorization required.', '{STEVE}')\n"
    assert outcome.code == 1
    assert not heard_password(server)


def test_password_is_not_sent_to_a_localhost_that_is_elsewhere(send: Send, serve: Serve) -> None:
    server = serve({}, "AUTH PLAIN")
    outcome = send(server, patch="socket.socket.getpeername = lambda self: ('192.0.2.1', 25)", **LOGIN)
    assert (outcome.code, heard_password(server)) == (1, False)
    assert "a password is not sent over a plain connection" in outcome.err


# ------------------------------------------------------------------------------------------------------- login


def test_loopback_gets_the_password_plainly_and_under_any_certificate(
    send: Send, serve: Serve, certified: Certified
) -> None:
    for tls, security in ((None, "plain"), (certified("localhost"), "STARTTLS, certificate not verified")):
        server = serve({}, "AUTH PLAIN", tls=tls)
        outcome = send(server, **LOGIN)
        assert outcome.out.startswith(f"Opened SMTP connection ({security})\n")
        assert (outcome.code, heard_password(server)) == (0, True)


@pytest.mark.parametrize(("reply", "code"), [("535 5.7.8 wrong", 1), ("454 4.7.0 try later", 75)])
def test_refused_login_is_printed_as_smtplib_gives_it(reply: str, code: int, send: Send, serve: Serve) -> None:
    server = serve({"AUTH": reply}, "AUTH PLAIN")
    outcome = send(server, **LOGIN)
    number, _, text = reply.partition(" ")
    assert (outcome.err, outcome.out) == (f"({number}, b'{text}')\n", "")
    assert (outcome.code, server.mails) == (code, [])


@pytest.mark.parametrize("extensions", [(), ("AUTH GSSAPI XOAUTH2",)])
def test_login_that_the_server_does_not_know_is_no_temporary_failure(
    extensions: tuple[str, ...], send: Send, serve: Serve
) -> None:
    server = serve({}, *extensions)
    outcome = send(server, **LOGIN)
    assert outcome.err.startswith("sparkpostSMIME.py: localhost port ")
    assert (outcome.code, outcome.out) == (1, "")
    assert b"mail from" not in server.heard.lower()


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_server_that_echoes_the_login_does_not_get_it_printed(mechanism: str, send: Send, serve: Serve) -> None:
    """`send` looks for the password and its base64 in the output."""
    echo = {"PLAIN": {"AUTH": lambda line: f"535 {line} {PASSWORD}"}}
    echo["LOGIN"] = {"AUTH": lambda line: "334 UGFzc3dvcmQ6", "response": lambda line: f"535 {line} {PASSWORD}"}
    server = serve(echo[mechanism], f"AUTH {mechanism}")
    outcome = send(server, **LOGIN)
    assert outcome.code == 1
    assert heard_password(server)
    assert outcome.err.startswith("(535, b'")
    assert "*" * 40 in outcome.err
    assert PLAIN_LOGIN not in outcome.err


def test_server_that_asks_for_ever_does_not_get_the_password_printed(send: Send, serve: Serve) -> None:
    challenge = f"334 {base64_of(PASSWORD)}"
    outcome = send(serve({"AUTH": challenge, "response": challenge}, "AUTH LOGIN"), **LOGIN)
    assert outcome.err
    assert (outcome.code, outcome.out) == (1, "")


def test_server_that_echoes_the_password_later_does_not_get_it_printed(send: Send, serve: Serve) -> None:
    server = serve({"RCPT": f"550 5.7.1 not with {PASSWORD}"}, "AUTH PLAIN")
    outcome = send(server, **LOGIN)
    assert "5.7.1 not with ****" in outcome.err
    assert outcome.code == 1


@pytest.mark.parametrize("password", [r"back\slash", "quo'te", "quo\"te's", "{}$%"])
def test_password_of_any_characters_logs_in_and_is_not_printed(password: str, send: Send, serve: Serve) -> None:
    server = serve({"AUTH": f"535 5.7.8 {password} is wrong"}, "AUTH PLAIN")
    outcome = send(server, SMTP_USER=USER, SMTP_PASSWORD=password)
    assert base64_of(f"\0{USER}\0{password}").encode() in server.heard
    assert outcome.code == 1
    assert f"5.7.8 {'*' * 40} is wrong" in outcome.err
