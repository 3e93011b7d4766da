"""The SMTP transport with servers that refuse, break off, fall silent or talk nonsense."""

from __future__ import annotations

import re
import socket
import time

import pytest
from conftest import BOB, CAROL, STEVE, STEVET, Run, mail
from faulty import (  # the fixtures among them are used by name
    QUICK,
    Answer,
    Fault,
    Open,
    Send,
    Serve,
    send_by_smtp,  # noqa: F401
    sometimes,
    start_faulty,  # noqa: F401
    start_mailbox,  # noqa: F401
)
from servers import free_port
from test_many import slow

RELAYING = "550 5.7.1 relaying denied"


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


@pytest.mark.parametrize(("second", "code"), [("550 5.1.1 unknown", 1), ("450 4.2.1 later", 75), ("421 4.4.5 bye", 75)])
def test_all_refused_is_temporary_only_when_every_refusal_is(second: str, code: int, send: Send, serve: Serve) -> None:
    answers = {"RCPT TO:<bob": second, "RCPT": "450 4.7.1 greylisted"}
    server = serve(answers)
    outcome = send(server, mail(To=f"{STEVET}, {BOB}"))
    number, _, text = second.partition(" ")
    assert outcome.err == f"{{'{STEVET}': (450, b'4.7.1 greylisted'), '{BOB}': ({number}, b'{text}')}}\n"
    assert (outcome.code, server.mails) == (code, [])


@pytest.mark.parametrize("extensions", [[], ["PIPELINING"]], ids=str)
def test_recipient_to_whom_the_server_forwards_has_the_message(extensions: list[str], send: Send, serve: Serve) -> None:
    server = serve({"RCPT": "251 2.1.5 not here, will forward"}, *extensions)
    outcome = send(server)
    assert (outcome.code, outcome.err, [each.recipients for each in server.mails]) == (0, "", [[STEVET]])


def test_nothing_is_said_to_a_server_that_closes(send: Send, serve: Serve) -> None:
    server = serve({"MAIL": "421 4.3.2 too busy"})
    assert send(server).code == 75
    assert server.heard.lower().endswith(b"mail from:<%b>\r\n" % STEVE.encode())


def test_server_that_closes_among_the_recipients_is_told_as_smtplib_does(send: Send, serve: Serve) -> None:
    outcome = send(serve({"RCPT TO:<bob": "421 4.4.5 bye"}), mail(To=f"{STEVET}, {BOB}"))
    assert outcome.err.startswith(f"{{'{BOB}': (421, b'4.4.5 bye')}}\n")
    assert outcome.code == 75


@pytest.mark.parametrize(
    "answers", [{"RCPT": "252 2.1.5 cannot verify, but will take it"}, {"MAIL": "200 ok"}], ids=str
)
def test_nobody_gets_an_empty_message_of_a_server_that_may_have_accepted(
    answers: dict[str, str], send: Send, serve: Serve
) -> None:
    server = serve(answers, "PIPELINING")
    assert send(server).code == 1
    assert server.mails == []


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
    assert done.returncode == (75 if host == "two words" else 1)
    assert re.fullmatch(rf"sparkpostSMIME.py: {host}.*SMTP_HOST.*\n", done.stderr.decode())


@pytest.mark.parametrize("stage", ["connect", "EHLO", "MAIL", "RCPT", "DATA", "body"])
def test_connection_lost_before_the_message_was_handed_over(stage: str, send: Send, serve: Serve) -> None:
    outcome = send(serve({stage: Fault.DROP}), mail(b"A long line of text.\r\n" * 300_000))
    assert outcome.code == 75
    assert re.fullmatch(r"sparkpostSMIME.py: localhost port \d+: .*\n", outcome.err)
    assert "sent" not in outcome.err
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


def test_server_may_think_about_a_message_for_long(send: Send, serve: Serve) -> None:
    outcome = send(serve({"dot": slow(1.5)}), patch=QUICK)
    assert (outcome.code, outcome.err) == (0, "")


def test_large_message_may_take_long(send: Send, serve: Serve) -> None:
    server = serve()
    server.lines_in_a_row = 20_000
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    lines = b"A line of text, which is as long as lines of text in a message mostly are.\r\n" * 160_000
    outcome = send(server, mail(lines), patch=QUICK)
    assert (outcome.code, outcome.err) == (0, "")
    assert server.mails[0].content.endswith(lines)
    taken = re.search(r"OK - in (\d+\.\d+) seconds", outcome.out)
    assert taken
    assert float(taken[1]) > 1


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.SILENCE])
def test_fault_after_acceptance_changes_nothing(fault: Fault, send: Send, serve: Serve) -> None:
    began = time.monotonic()
    outcome = send(serve({"QUIT": fault}))
    assert (outcome.code, outcome.err) == (0, "")
    assert time.monotonic() - began < 10
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


@pytest.mark.parametrize("answer", [Fault.ENDLESS, "\x16\x03\x01 nonsense"])
def test_unreadable_answer_after_the_dot_says_that_it_may_have_been_sent(
    answer: Answer, send: Send, serve: Serve
) -> None:
    outcome = send(serve({"dot": answer}))
    assert "may have been sent" in outcome.err
    assert outcome.code in (1, 75)


def test_nonsense_after_a_refusal_does_not_undo_it(send: Send, serve: Serve) -> None:
    outcome = send(serve({"RCPT": "450 4.2.1 later", "RSET": Fault.ENDLESS}))
    assert (outcome.code, outcome.err) == (75, f"{{'{STEVET}': (450, b'4.2.1 later')}}\n")


# ------------------------------------------------------------------------------------ one of several copies fails


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


def test_patience_for_the_answer_to_a_message_ends_with_it(send: Send, serve: Serve) -> None:
    server = serve({"MAIL": sometimes(Fault.SILENCE, lambda number: number == 2)})
    began = time.monotonic()
    outcome = send(server, mail(Bcc=CAROL), "--encrypt", patch=QUICK.replace("1, 3", "1, 20"))
    assert (outcome.code, len(server.mails)) == (0, 2)
    assert time.monotonic() - began < 10
