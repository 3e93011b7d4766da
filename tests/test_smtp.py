"""The SMTP transport with servers that take the message: what is sent and what is reported."""

from __future__ import annotations

import email
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import BOB, CAROL, STEVE, STEVET, TESTS, Run, mail
from faulty import (  # the fixtures among them are used by name
    Open,
    Send,
    Serve,
    redirected,
    send_by_smtp,  # noqa: F401
    start_faulty,  # noqa: F401
    start_mailbox,  # noqa: F401
)
from pki import Authority
from readers import Openssl, command, der_of

COMPLETE = {"Date": "Fri, 01 Dec 2028 10:00:00 +0000", "Message_ID": "<1@thetucks.com>", "MIME_Version": "1.0"}


def entity_of(message: bytes) -> bytes:
    return message[message.index(b"Content-Type:") :]


# ------------------------------------------------------------------------------------------ what is sent and said


def test_report_is_that_of_the_mission_document(run: Run, folder: Path, open_mailbox: Open) -> None:
    (folder / "tests").mkdir()
    shutil.copy(TESTS / "fancy-HTML-to-smt.eml", folder / "tests")
    port = str(open_mailbox().port)
    message = "tests/fancy-HTML-to-smt.eml"
    done = run(message, "--sign", "--encrypt", "--send_smtp", SMTP_HOST="localhost", SMTP_PORT=port)
    report, _, seconds = done.stdout.decode().rpartition("OK - in ")
    assert report == (
        "Opened SMTP connection (plain)\n"
        "Host: localhost\n"
        f"Port: {port}\n"
        'User: ""\n'
        'Password: ""\n'
        "Sending: tests/fancy-HTML-to-smt.eml\n"
        "From: Steve <steve@thetucks.com>\n"
        "To: SteveT <steve.tuck@sparkpost.com>\n"
    )
    assert re.fullmatch(r"\d\.\d{3} seconds\n", seconds)
    assert (done.returncode, done.stderr) == (0, b"")


def test_port_is_25_unless_set(send: Send, serve: Serve) -> None:
    server = serve()
    outcome = send(server, SMTP_PORT="", patch=redirected(server.port))
    assert "Port: 25\n" in outcome.out
    assert len(server.mails) == 1


BODIES = {
    "dots": b".\r\n..\r\n.a\r\n\r\n.\r\nend\r\n",
    "dot at the end": b"one\r\n.\r\n",
    "From": b"From here\r\n>From there\r\n",
    "blanks": b"trailing \t\r\n\r\n\r\n",
    "eight-bit": "Grüße\r\n".encode(),
    "empty": b"",
    "one whole piece": (b"a" * 98 + b"\r\n") * 1000,
}
BODIES["one whole piece"] = BODIES["one whole piece"][len(mail(b"", **COMPLETE)) :]  # PIECE bytes with the header


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_message_arrives_byte_for_byte(body: bytes, send: Send, open_mailbox: Open) -> None:
    mailbox = open_mailbox()
    assert send(mailbox, mail(body, **COMPLETE, Bcc=CAROL)).code == 0
    assert mailbox.mails[0].content == mail(body, **COMPLETE)


def test_line_ends_become_crlf_and_dots_are_stuffed(send: Send, serve: Serve) -> None:
    server = serve()
    data = mail(b"one\n.two\n.\nthree", **COMPLETE).replace(b"\r\n", b"\n")
    assert send(server, data).code == 0
    assert send(server, b".A: field\r\n" + data).code == 0
    stuffed = mail(b"one\r\n..two\r\n..\r\nthree\r\n", **COMPLETE)
    assert [each.content for each in server.mails] == [stuffed, b"..A: field\r\n" + stuffed]


def test_envelope_names_everyone_once(send: Send, serve: Serve) -> None:
    server = serve()
    data = mail(To=f"{STEVET}, {BOB}", Cc=f"Bob <{BOB}>", Bcc=CAROL, Sender=BOB, From_=f"{STEVE}, {CAROL}")
    outcome = send(server, data)
    assert outcome.code == 0
    assert (server.mails[0].sender, server.mails[0].recipients) == (BOB, [STEVET, BOB, CAROL])
    assert b"bcc" not in server.mails[0].content.lower()
    assert server.heard.endswith(b".\r\nquit\r\n")


@pytest.mark.parametrize(
    ("return_path", "sender"),
    [("bounces@thetucks.com", "bounces@thetucks.com"), ("<>", ""), ("x@ü.de", "x@xn--tda.de")],
)
def test_return_path_is_the_envelope_sender(return_path: str, sender: str, send: Send, serve: Serve) -> None:
    server = serve()
    assert send(server, mail(), "--return_path", return_path).code == 0
    assert server.mails[0].sender == sender
    assert f"From: Steve <{STEVE}>".encode() in server.mails[0].content


@pytest.mark.parametrize(
    "address",
    [
        '"john doe"@example.com',
        '"a,b"@example.com',
        r'"a\"b"@example.com',
        '"a@b"@example.com',
        "user@[192.0.2.1]",
        "o'brien+tag=x@example.com",
        "a..b.@example.com",
        "x" * 64 + "@example.com",
    ],
)
def test_odd_address_arrives_as_it_is_spelt(address: str, send: Send, serve: Serve) -> None:
    server = serve()
    assert send(server, mail(To=f"Odd <{address}>")).code == 0
    assert server.mails[0].recipients == [address]


@pytest.mark.parametrize("length", [1, 39, 41, 300])
def test_password_is_shown_as_forty_stars(length: int, send: Send, serve: Serve) -> None:
    outcome = send(serve({}, "AUTH PLAIN"), SMTP_USER="me", SMTP_PASSWORD="~" * length)
    assert f'\nUser: "me"\nPassword: "{"*" * 40}"\n' in outcome.out
    assert "~" not in outcome.out
    assert outcome.code == 0


def test_login_that_the_server_does_not_offer_is_told_with_its_cure(send: Send, serve: Serve) -> None:
    server = serve()
    outcome = send(server, SMTP_USER="me", SMTP_PASSWORD="secret")
    assert (outcome.code, outcome.out, server.mails, len(outcome.err.splitlines())) == (1, "", [], 1)
    assert "SMTP_USER" in outcome.err
    assert "running" not in outcome.err


@pytest.mark.parametrize(
    ("host", "off"),
    [
        ("smtp.sparkpostmail.com", True),
        ("SMTP.eu.SparkPostMail.com", True),
        ("localhost", False),
        ("sparkpostmail.com.example.net", False),
        ("notsparkpostmail.com", False),
    ],
)
def test_tracking_is_turned_off_at_sparkpost_alone(host: str, off: bool, send: Send, serve: Serve) -> None:
    server = serve()
    assert send(server, mail(), "--sign", patch=redirected(server.port), SMTP_HOST=host).code == 0
    found = email.message_from_bytes(server.mails[0].content).get_all("X-MSYS-API", [])
    options = {"open_tracking": False, "click_tracking": False}
    assert [json.loads(value)["options"] for value in found] == ([options] if off else [])


def test_header_for_sparkpost_of_ones_own_stays(send: Send, serve: Serve) -> None:
    server = serve()
    own = '{"campaign_id": "spring"}'
    send(server, mail(X_MSYS_API=own), patch=redirected(server.port), SMTP_HOST="smtp.sparkpostmail.com")
    assert email.message_from_bytes(server.mails[0].content).get_all("X-MSYS-API") == [own]


def test_dns_is_not_asked_for_the_full_name_of_this_host(send: Send, serve: Serve) -> None:
    server = serve()
    assert send(server, patch="socket.getfqdn = socket.gethostbyaddr = None").code == 0
    assert re.match(rb"ehlo ([\w-]+(\.[\w-]+)+|\[[\d.]+\])\r\n", server.heard)


# -------------------------------------------------------------------------- addresses and text outside ASCII


def test_address_outside_ascii_goes_where_smtputf8_is_offered(send: Send, open_mailbox: Open) -> None:
    mailbox = open_mailbox(enable_SMTPUTF8=True)
    assert send(mailbox, mail(To="Jörg <jörg@example.com>")).code == 0
    assert mailbox.mails[0].rcpt_tos == ["jörg@example.com"]
    assert mailbox.mails[0].smtp_utf8
    assert "<jörg@example.com>".encode() in mailbox.mails[0].content


@pytest.mark.parametrize("fields", [{"To": "jörg@example.com"}, {"From_": "jörg@example.com"}, {"Cc": "jörg@ü.de"}])
def test_address_outside_ascii_is_an_error_elsewhere(fields: dict[str, str], send: Send, serve: Serve) -> None:
    server = serve({}, "8BITMIME")
    outcome = send(server, mail(b"Hello\r\n", **fields))
    assert re.search("localhost does not offer SMTPUTF8.*\n", outcome.err)
    assert outcome.code == 1
    assert b"mail from" not in server.heard.lower()


def test_domain_outside_ascii_goes_as_a_labels(send: Send, serve: Serve) -> None:
    server = serve()
    outcome = send(server, mail(From_="Jörg <joerg@bücher.example>", To="anna@faß.example, bob@BÜCHER.example"))
    assert outcome.code == 0
    taken = server.mails[0]
    assert (taken.sender, taken.options) == ("joerg@xn--bcher-kva.example", "")
    assert taken.recipients == ["anna@xn--fa-hia.example", "bob@xn--bcher-kva.example"]
    assert taken.content.isascii()
    header = email.message_from_bytes(taken.content)
    assert header["From"].endswith(" <joerg@xn--bcher-kva.example>")
    assert header["To"] == "anna@xn--fa-hia.example, bob@xn--bcher-kva.example"


def test_a_mailbox_in_both_spellings_of_its_domain_is_one_recipient(send: Send, serve: Serve) -> None:
    server = serve()
    outcome = send(server, mail(To="anna@bücher.example", Cc="anna@XN--BCHER-KVA.example"))
    assert (outcome.code, outcome.err) == (0, "")
    assert [each.recipients for each in server.mails] == [["anna@xn--bcher-kva.example"]]


@pytest.mark.parametrize(("extension", "options"), [("8BITMIME", " BODY=8BITMIME"), ("PIPELINING", "")])
def test_eight_bit_text_is_declared_where_that_is_offered(
    extension: str, options: str, send: Send, serve: Serve
) -> None:
    server = serve({}, extension)
    assert send(server, mail("Grüße\r\n".encode())).code == 0
    assert server.mails[0].options == options
    assert server.mails[0].content.endswith("\r\n\r\nGrüße\r\n".encode())


@pytest.mark.parametrize("option", ["--recipient", "--return_path"])
def test_address_outside_ascii_of_the_command_line_is_an_error_elsewhere(option: str, send: Send, serve: Serve) -> None:
    server = serve()
    outcome = send(server, mail(), option, "jörg@x.example")
    assert (outcome.code, b"mail from" in server.heard.lower()) == (1, False)
    assert "does not offer SMTPUTF8" in outcome.err


# --------------------------------------------------------------------------------------------- encrypted with Bcc


def test_bcc_recipient_of_an_encrypted_message_is_in_no_other_copy(
    send: Send, serve: Serve, openssl: Openssl, authority: Authority
) -> None:
    server = serve()
    data = mail(b"Hello Steve\r\n", Cc=BOB, Bcc=f"{CAROL}, {STEVE}", **COMPLETE)
    outcome = send(server, data, "--sign", "--encrypt", "--date_now")
    assert outcome.code == 0
    copies = {tuple(taken.recipients): taken.content for taken in server.mails}
    assert list(copies) == [(STEVET, BOB), (CAROL,), (STEVE,)]
    signed = set()
    for recipients, content in copies.items():
        der = der_of(entity_of(content))
        structure = command("openssl", "cms", "-cmsout", "-print", "-noout", "-inform", "DER", data=der)
        for address in (STEVE, STEVET, BOB, CAROL):
            identity = authority.identity(address)
            serial = b"%X" % identity.certificate.serial_number
            assert (serial in structure) == (address in recipients)
            if address in recipients:
                signed.add(openssl.decrypt(entity_of(content), identity))
    assert len(signed) == 1
    assert b"Hello Steve" in openssl.verify(signed.pop())
    assert len({content[: content.index(b"Content-Type:")] for content in copies.values()}) == 1


def test_missing_certificate_of_a_bcc_recipient_stops_everything(send: Send, serve: Serve, folder: Path) -> None:
    server = serve()
    (folder / f"{CAROL}.crt").unlink()
    outcome = send(server, mail(Bcc=CAROL), "--encrypt")
    assert (outcome.code, outcome.out, server.heard) == (1, "", b"")
    assert f"{CAROL}.crt not found" in outcome.err
