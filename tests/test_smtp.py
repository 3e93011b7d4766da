"""The SMTP transport: what is sent, what is reported, and what becomes of every fault of a server."""

from __future__ import annotations

import email
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import BOB, CAROL, STEVE, STEVET, TESTS, Run, mail
from faulty import QUICK, Answer, Fault, Open, Send, Serve, redirected
from pki import Authority
from readers import Openssl, command, der_of
from servers import free_port

pytest_plugins = ["faulty"]
COMPLETE = {"Date": "Fri, 01 Dec 2028 10:00:00 +0000", "Message_ID": "<1@thetucks.com>", "MIME_Version": "1.0"}
RELAYING = "550 5.7.1 relaying denied"


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
    outcome = send(server, SMTP_PORT="", patch=redirected(server.port).replace("address, *", "address, *"))
    assert "Port: 25\n" in outcome.out
    assert len(server.mails) == 1


BODIES = {
    "dots": b".\r\n..\r\n.a\r\n\r\n.\r\nend\r\n",
    "dot at the end": b"one\r\n.\r\n",
    "From": b"From here\r\n>From there\r\n",
    "blanks": b"trailing \t\r\n\r\n\r\n",
    "eight-bit": "Grüße\r\n".encode(),
    "empty": b"",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_message_arrives_byte_for_byte(body: bytes, send: Send, open_mailbox: Open) -> None:
    mailbox = open_mailbox()
    assert send(mailbox, mail(body, **COMPLETE, Bcc=CAROL)).code == 0
    assert mailbox.mails[0].content == mail(body, **COMPLETE)


def test_line_ends_become_crlf_and_dots_are_stuffed(send: Send, serve: Serve) -> None:
    server = serve()
    data = mail(b"one\n.two\n.\nthree", **COMPLETE).replace(b"\r\n", b"\n")
    assert send(server, data).code == 0
    assert server.mails[0].content == mail(b"one\r\n..two\r\n..\r\nthree\r\n", **COMPLETE)


def test_envelope_names_everyone_once(send: Send, serve: Serve) -> None:
    server = serve()
    data = mail(To=f"{STEVET}, {BOB}", Cc=f"Bob <{BOB}>", Bcc=CAROL, Sender=BOB, From_=f"{STEVE}, {CAROL}")
    outcome = send(server, data)
    assert outcome.code == 0
    assert (server.mails[0].sender, server.mails[0].recipients) == (BOB, [STEVET, BOB, CAROL])
    assert b"bcc" not in server.mails[0].content.lower()
    assert server.heard.endswith(b".\r\nquit\r\n")


@pytest.mark.parametrize(
    ("return_path", "sender"), [("bounces@thetucks.com", "bounces@thetucks.com"), ("<>", ""), ("x@ü.de", "x@xn--tda.de")]
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
    outcome = send(serve({}, "AUTH PLAIN"), SMTP_USER="me", SMTP_PASSWORD="é"[:0] + "~" * length)
    assert f'\nUser: "me"\nPassword: "{"*" * 40}"\n' in outcome.out
    assert "~" not in outcome.out
    assert outcome.code == 0


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


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("answers", "printed", "code"),
    [
        ({"connect": "421 4.3.2 too busy"}, "(421, b'4.3.2 too busy')", 75),
        ({"connect": "554 5.7.1 go away"}, "(554, b'5.7.1 go away')", 1),
        ({"EHLO": "550 no", "HELO": "550 5.7.1 bad name"}, "(550, b'5.7.1 bad name')", 1),
        ({"EHLO": "450 no", "HELO": "450 4.7.1 greylisted"}, "(450, b'4.7.1 greylisted')", 75),
        ({"MAIL": "451 4.3.0 later"}, f"(451, b'4.3.0 later', '{STEVE}')", 75),
        ({"MAIL": "421 4.4.5 too many sessions"}, f"(421, b'4.4.5 too many sessions', '{STEVE}')", 75),
        (
            {"MAIL": "530 5.7.1 Authorization required. Ref. https://example.com/smtp"},
            f"(530, b'5.7.1 Authorization required. Ref. https://example.com/smtp', '{STEVE}')",
            1,
        ),
        ({"MAIL": "550-5.7.1 one\r\n550 5.7.1 \x1b[2Jtwo"}, rf"(550, b'5.7.1 one\n5.7.1 \x1b[2Jtwo', '{STEVE}')", 1),
        ({"RCPT": RELAYING}, f"{{'{STEVET}': (550, b'5.7.1 relaying denied')}}", 1),
        ({"RCPT": "450 4.2.1 later"}, f"{{'{STEVET}': (450, b'4.2.1 later')}}", 75),
        ({"RCPT": "421 4.4.5 bye"}, f"{{'{STEVET}': (421, b'4.4.5 bye')}}", 75),
        ({"DATA": "451 4.3.0 later"}, "(451, b'4.3.0 later')", 75),
        ({"DATA": "554 5.5.1 no valid recipients"}, "(554, b'5.5.1 no valid recipients')", 1),
        ({"dot": "451 4.3.0 disk full"}, "(451, b'4.3.0 disk full')", 75),
        ({"dot": "421 4.3.2 shutting down"}, "(421, b'4.3.2 shutting down')", 75),
        ({"dot": "554 5.7.1 spam"}, "(554, b'5.7.1 spam')", 1),
    ],
)
def test_refusal_is_printed_as_smtplib_gives_it(
    answers: dict[str, Answer], printed: str, code: int, send: Send, serve: Serve
) -> None:
    outcome = send(serve(answers))
    assert (outcome.err, outcome.code) == (printed + "\n", code)
    assert "OK" not in outcome.out


def test_server_without_ehlo_gets_the_message(send: Send, serve: Serve) -> None:
    server = serve({"EHLO": "502 5.5.1 what"})
    assert send(server).code == 0
    assert (server.mails[0].options, server.mails[0].recipients) == ("", [STEVET])


def test_partly_refused_is_told_with_the_number_accepted(send: Send, open_mailbox: Open) -> None:
    mailbox = open_mailbox()
    mailbox.refusals[BOB] = RELAYING
    outcome = send(mailbox, mail(To=f"{STEVET}, {BOB}, {CAROL}"))
    assert outcome.err == f"{{'{BOB}': (550, b'5.7.1 relaying denied')}}\n"
    assert re.search(r"\nOK for 2 of 3 recipients - in \d\.\d{3} seconds\n\Z", outcome.out)
    assert outcome.code == 1
    assert mailbox.mails[0].rcpt_tos == [STEVET, CAROL]


@pytest.mark.parametrize(
    ("second", "code"), [("550 5.1.1 unknown", 1), ("450 4.2.1 later", 75), ("421 4.4.5 bye", 75)]
)
def test_all_refused_is_temporary_only_when_every_refusal_is(
    second: str, code: int, send: Send, serve: Serve
) -> None:
    answers = {"RCPT TO:<bob": second, "RCPT": "450 4.7.1 greylisted"}
    server = serve(answers)
    outcome = send(server, mail(To=f"{STEVET}, {BOB}"))
    number, _, text = second.partition(" ")
    assert outcome.err == f"{{'{STEVET}': (450, b'4.7.1 greylisted'), '{BOB}': ({number}, b'{text}')}}\n"
    assert (outcome.code, server.mails) == (code, [])


# ------------------------------------------------------------------------- servers that are away, or fall silent


def test_refused_connection_is_temporary(run: Run) -> None:
    port = str(free_port())
    done = run("-", "--send_smtp", data=mail(), SMTP_HOST="localhost", SMTP_PORT=port)
    assert (done.returncode, done.stdout) == (75, b"")
    assert re.fullmatch(rf"sparkpostSMIME.py: localhost port {port}: Connection refused - .+\n", done.stderr.decode())


def test_name_that_does_not_resolve_is_temporary(run: Run) -> None:
    done = run("-", "--send_smtp", data=mail(), SMTP_HOST="mail.invalid")
    assert (done.returncode, done.stdout) == (75, b"")
    assert re.fullmatch(rb"sparkpostSMIME.py: mail.invalid port 25: .+ - .*SMTP_HOST.*\n", done.stderr)


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example", "two words"])
def test_impossible_host_name_is_one_clear_line(host: str, run: Run) -> None:
    done = run("-", "--send_smtp", data=mail(), SMTP_HOST=host)
    assert done.returncode in (1, 75)
    assert re.fullmatch(rf"sparkpostSMIME.py: {host}.*SMTP_HOST.*\n", done.stderr.decode())


@pytest.mark.parametrize("stage", ["connect", "EHLO", "MAIL", "RCPT", "DATA", "body"])
def test_connection_lost_before_the_message_was_handed_over(stage: str, send: Send, serve: Serve) -> None:
    outcome = send(serve({stage: Fault.DROP}), mail(b"A long line of text.\r\n" * 300_000))
    assert outcome.code == 75
    assert re.fullmatch(r"sparkpostSMIME.py: localhost port \d+: .*\n", outcome.err)
    assert stage == "body" or "sent" not in outcome.err
    assert "OK" not in outcome.out


def test_connection_lost_after_the_dot_says_that_it_may_have_been_sent(send: Send, serve: Serve) -> None:
    outcome = send(serve({"dot": Fault.DROP}))
    assert outcome.code == 75
    assert re.fullmatch(r"sparkpostSMIME.py: localhost port \d+: .*may have been sent.*\n", outcome.err)


@pytest.mark.parametrize("stage", ["connect", "EHLO", "MAIL", "RCPT", "DATA", "dot"])
def test_silent_server_is_given_up(stage: str, send: Send, serve: Serve) -> None:
    outcome = send(serve({stage: Fault.SILENCE}), patch=QUICK)
    assert outcome.code == 75
    assert re.fullmatch(r"sparkpostSMIME.py: localhost port \d+: .*timed out.*\n", outcome.err)
    assert ("may have been sent" in outcome.err) == (stage == "dot")


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.SILENCE])
def test_fault_after_acceptance_changes_nothing(fault: Fault, send: Send, serve: Serve) -> None:
    outcome = send(serve({"QUIT": fault}), patch=QUICK)
    assert (outcome.code, outcome.err) == (0, "")
    seconds = re.search(r"OK - in (\d\.\d{3}) seconds", outcome.out)
    assert seconds
    assert float(seconds[1]) < 1


@pytest.mark.parametrize("stage", ["connect", "MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("garbage", ["SSH-2.0-OpenSSH_9.2", "\x16\x03\x01", "", "2", "999 what"])
def test_garbage_is_no_success(stage: str, garbage: str, send: Send, serve: Serve) -> None:
    server = serve({stage: garbage})
    outcome = send(server)
    assert (outcome.code, server.mails) == (1, [])
    assert len(outcome.err.splitlines()) == 1
    assert "OK" not in outcome.out


@pytest.mark.parametrize("stage", ["connect", "EHLO", "DATA"])
def test_endless_line_is_cut_short(stage: str, send: Send, serve: Serve) -> None:
    server = serve({stage: Fault.ENDLESS})
    outcome = send(server)
    assert outcome.code in (1, 75)
    assert len(outcome.err) < 300
    assert server.mails == []


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
    outcome = send(server, mail(**fields))
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


@pytest.mark.parametrize(("extension", "options"), [("8BITMIME", " BODY=8BITMIME"), ("PIPELINING", "")])
def test_eight_bit_text_is_declared_where_that_is_offered(
    extension: str, options: str, send: Send, serve: Serve
) -> None:
    server = serve({}, extension)
    assert send(server, mail("Grüße\r\n".encode())).code == 0
    assert server.mails[0].options == options
    assert server.mails[0].content.endswith("\r\n\r\nGrüße\r\n".encode())


# --------------------------------------------------------------------------------------------- encrypted with Bcc


def test_bcc_recipient_of_an_encrypted_message_is_in_no_other_copy(
    send: Send, serve: Serve, openssl: Openssl, authority: Authority
) -> None:
    server = serve()
    outcome = send(server, mail(Cc=BOB, Bcc=f"{CAROL}, {STEVE}", **COMPLETE), "--sign", "--encrypt", "--date_now")
    assert outcome.code == 0
    copies = {tuple(taken.recipients): taken.content for taken in server.mails}
    assert list(copies) == [(STEVET, BOB), (CAROL,), (STEVE,)]
    signed = set()
    for recipients, content in copies.items():
        der = der_of(entity_of(content))
        structure = command("openssl", "cms", "-cmsout", "-print", "-noout", "-inform", "DER", data=der)
        for address in (STEVE, STEVET, BOB, CAROL):
            identity = authority.identity(address)
            serial = b"0x%X" % identity.certificate.serial_number
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


def test_refused_copy_does_not_keep_the_others_back(send: Send, serve: Serve) -> None:
    server = serve({"RCPT TO:<steve.tuck": RELAYING})
    outcome = send(server, mail(Bcc=CAROL), "--encrypt")
    assert outcome.err == f"{{'{STEVET}': (550, b'5.7.1 relaying denied')}}\n"
    assert "\nOK for 1 of 2 recipients - in " in outcome.out
    assert (outcome.code, [taken.recipients for taken in server.mails]) == (1, [[CAROL]])


@pytest.mark.parametrize("stage", ["MAIL", "dot"])
def test_connection_lost_between_copies_is_told_truly(stage: str, send: Send, serve: Serve) -> None:
    outcome = send(serve({stage: Fault.DROP}), mail(Bcc=CAROL), "--encrypt")
    assert outcome.err.count("may have been sent") == (stage == "dot")
    assert "connect()" not in outcome.err  # smtplib's advice to programmers
    assert outcome.code == 75
