"""SMTP command pipelining (RFC 2920): fewer round trips, and every answer told exactly as without it."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import BOB, CAROL, STEVET, Run, mail
from faulty import (  # the fixtures among them are used by name
    Answer,
    Dialogue,
    Fault,
    Faulty,
    LastWord,
    Mail,
    Outcome,
    Send,
    Serve,
    send_by_smtp,  # noqa: F401
    start_faulty,  # noqa: F401
)
from pki import Authority
from readers import Openssl
from test_many import letters, steady, to
from test_readers import inner

PIPELINING = "PIPELINING"
TO_THREE = mail(To=f"{STEVET}, {BOB}, {CAROL}", Date="Mon, 24 Nov 2025 10:00:00 +0000", Message_ID="<one@thetucks.com>")
STEVET_TO, BOB_TO, CAROL_TO = (f"RCPT TO:<{address}" for address in (STEVET, BOB, CAROL))
LATER, UNKNOWN, MANY = "450 4.2.1 later", "550 5.1.1 unknown", "452 4.5.3 too many recipients"
CLOSING, NOBODY = "421 4.3.2 shutting down", "554 5.5.1 no valid recipients"


CRAMPED = """
connect = socket.create_connection
def cramped(*rest, **named):
    session = connect(*rest, **named)
    session.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    return session
socket.create_connection = cramped
"""


class Flights(Dialogue):
    """Notes what comes without a pause, and so without an answer in between."""

    QUIET = 0.05  # seconds

    def setup(self) -> None:
        super().setup()
        self.pending: list[bytes] = []
        self.flights: list[bytes] = self.server.__dict__.setdefault("flights", [])

    def hear(self) -> bytes:
        if not self.pending:
            self.request.settimeout(None)
            flight = self.request.recv(1 << 20)
            self.request.settimeout(self.QUIET)
            with suppress(TimeoutError):
                while chunk := self.request.recv(1 << 20):
                    flight += chunk
            self.flights.append(flight)
            self.pending = flight.splitlines(keepends=True)
        return self.pending.pop(0) if self.pending else b""


class Unread(Dialogue):
    """Has little room for what comes and goes, and long answers, so that both sides soon wait for the other."""

    def setup(self) -> None:
        super().setup()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.request.setsockopt(socket.SOL_SOCKET, option, 16384)


class Limit:
    """Takes so many recipients in a transaction."""

    def __init__(self, recipients: int, refusal: str = MANY) -> None:
        self.recipients, self.refusal, self.taken = recipients, refusal, 0

    def begin(self, _: str) -> str:
        self.taken = 0
        return "250 2.1.0 ok"

    def take(self, _: str) -> str:
        self.taken += 1
        return "250 2.1.5 ok" if self.taken <= self.recipients else self.refusal

    @property
    def answers(self) -> dict[str, Answer]:
        return {"MAIL": self.begin, "RCPT": self.take}


def commands(flight: bytes) -> str:
    """The first word of each line, or the dot alone for a message."""
    return "." if flight.endswith(b"\r\n.\r\n") else " ".join(line.split()[0].decode() for line in flight.splitlines())


# --------------------------------------------------------------------------------------------------- round trips


def test_each_message_takes_two_round_trips(run: Run, serve: Serve, folder: Path) -> None:
    server = serve({}, PIPELINING)
    server.RequestHandlerClass = Flights
    letters(folder / "out", 3, Cc=BOB)
    assert run("out", "--send_smtp", **to(server)).returncode == 0
    assert [each.recipients for each in server.mails] == [[STEVET, BOB]] * 3
    flights = [commands(flight).lower() for flight in server.__dict__["flights"]]
    assert flights == ["ehlo", *["mail rcpt rcpt data", "."] * 3, "quit"]


@pytest.mark.parametrize("extensions", [[], ["SIZE 1000000", "X-PIPELINING"]], ids=str)
def test_a_server_that_does_not_offer_it_is_asked_step_by_step(
    extensions: list[str], run: Run, serve: Serve, folder: Path
) -> None:
    server = serve({}, *extensions)
    server.RequestHandlerClass = Flights
    letters(folder / "out", 2, Cc=BOB)
    assert run("out", "--send_smtp", **to(server)).returncode == 0
    flights = [commands(flight).lower() for flight in server.__dict__["flights"]]
    assert flights == ["ehlo", *["mail", "rcpt", "rcpt", "data", "."] * 2, "quit"]


def test_a_server_that_offers_nothing_is_asked_step_by_step(send: Send, serve: Serve) -> None:
    server = serve({"EHLO": "502 5.5.1 what"})
    server.RequestHandlerClass = Flights
    assert send(server).code == 0
    flights = [commands(flight).lower() for flight in server.__dict__["flights"]]
    assert flights == ["ehlo", "helo", "mail", "rcpt", "data", ".", "quit"]


@pytest.mark.parametrize("refusal", ["", UNKNOWN])
def test_five_hundred_recipients_and_long_answers_do_not_deadlock(refusal: str, send: Send, serve: Serve) -> None:
    domain = ".".join(letter * 62 for letter in "abc") + ".example"
    recipients = [f"{number:050}@{domain}" for number in range(500)]
    chatter = "".join(f"250-{'very ' * 90}\r\n" for _ in range(4))
    refused = {recipients[250]} if refusal else set()
    server = serve(
        {
            f"RCPT TO:<{recipients[250]}": refusal.replace(" ", "-", 1) + f"\r\n{refusal}"
            if refusal
            else chatter + "250 ok",
            "RCPT": chatter + "250 ok",
        },
        PIPELINING,
    )
    server.RequestHandlerClass = Unread
    outcome = send(server, mail(To=",\r\n ".join(recipients)), patch=CRAMPED)
    assert [each.recipients for each in server.mails] == [[each for each in recipients if each not in refused]]
    assert (outcome.code, outcome.err.count("5.1.1 unknown") > 0) == ((1, True) if refused else (0, False))
    assert ("\nOK for 499 of 500 recipients" if refused else "\nOK - in") in outcome.out


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "answers",
    [
        {"connect": CLOSING},
        {"EHLO": "550 no", "HELO": "550 5.7.1 bad name"},
        *({"MAIL": answer} for answer in ("451 4.3.0 later", "553 5.1.8 no", CLOSING, LastWord(CLOSING))),
        {"MAIL": "550-5.7.1 one\r\n550-5.7.1 two\r\n550 5.7.1 \x1b[2Jthree"},
        {"MAIL": LATER, "RCPT": NOBODY, "DATA": NOBODY},
        *({"RCPT": answer, "DATA": then} for answer in (UNKNOWN, LATER) for then in ("354 go", NOBODY, "503 5.5.1 no")),
        {"RCPT": UNKNOWN, "dot": NOBODY},
        {"RCPT": UNKNOWN, "dot": "451 4.3.0 later"},
        {"RCPT": UNKNOWN, "DATA": LastWord(CLOSING)},
        {"RCPT": CLOSING},
        {"RCPT": LastWord(CLOSING)},
        *({to_one: UNKNOWN} for to_one in (STEVET_TO, BOB_TO, CAROL_TO)),
        {STEVET_TO: LATER, BOB_TO: "550-5.1.1 un\r\n550 5.1.1 known", CAROL_TO: LATER},
        {STEVET_TO: UNKNOWN, CAROL_TO: LATER},
        {BOB_TO: CLOSING},
        {CAROL_TO: LastWord(CLOSING)},
        {BOB_TO: "251 2.1.5 will forward", CAROL_TO: "252 2.1.5 cannot verify"},
        *({"DATA": answer} for answer in ("451 4.3.0 later", NOBODY, CLOSING, LastWord(CLOSING), "250 2.0.0 what")),
        {BOB_TO: UNKNOWN, "DATA": "451 4.3.0 later"},
        *({"dot": answer} for answer in ("451 4.3.0 disk full", "554 5.7.1 spam", CLOSING, LastWord(CLOSING))),
        {BOB_TO: UNKNOWN, "dot": "554 5.7.1 spam"},
        *({stage: answer} for stage in ("MAIL", "RCPT", "DATA") for answer in ("999 what", "2", "", "\x16\x03\x01")),
    ],
    ids=lambda answers: ", ".join(f"{stage[-16:]} {ascii(answer)[:9]}" for stage, answer in answers.items()),
)
def test_every_answer_is_told_as_without_it(answers: dict[str, Answer], send: Send, serve: Serve) -> None:
    results: list[tuple[Outcome, list[Mail]]] = []
    for extensions in ([], [PIPELINING]):
        server = serve(answers, *extensions)
        outcome = send(server, TO_THREE)
        told = Outcome(outcome.code, *(steady(text).replace(str(server.port), "PORT") for text in outcome[1:]))
        results.append((told, [each for each in server.mails if each.recipients]))
    assert results[0] == results[1]
    assert results[0][0].err or results[0][0].code == 0


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.ENDLESS])
@pytest.mark.parametrize("stage", ["MAIL", STEVET_TO, CAROL_TO, "DATA", "body", "dot"])
def test_a_broken_dialogue_is_temporary_and_tells_what_may_have_been_sent(
    stage: str, fault: Fault, send: Send, serve: Serve
) -> None:
    server = serve({stage: fault}, PIPELINING)
    outcome = send(server, TO_THREE)
    assert outcome.code in ((75,) if fault is Fault.DROP else (1, 75))
    assert re.fullmatch(r"sparkpostSMIME\.py: localhost port \d+: .*\n|\(.*\)\n", outcome.err)
    assert stage == "body" or ("may have been sent" in outcome.err) == (stage == "dot")
    assert "OK" not in outcome.out
    assert len(server.mails) == (stage == "dot")


@pytest.mark.parametrize("end", ["250 2.0.0 queued", NOBODY, LastWord(CLOSING)])
def test_the_go_ahead_for_nobody_is_ended_with_a_lone_dot(end: str, run: Run, serve: Serve, folder: Path) -> None:
    server: Faulty = serve(
        {STEVET_TO: UNKNOWN, "dot": lambda _: "250 2.0.0 queued" if server.mails[-1].content else end}, PIPELINING
    )
    first, second = letters(folder / "out", 2)
    second.write_bytes(mail(To=BOB))
    done = run(first, second, "--send_smtp", **to(server))
    assert [(each.recipients, bool(each.content)) for each in server.mails] == [([], False), ([BOB], True)]
    assert done.stderr.decode().endswith(f"{first}: {{'{STEVET}': (550, b'5.1.1 unknown')}}\n")
    assert (done.returncode, done.stdout.count(b"OK - in")) == (1, 1)


def test_one_refused_among_several_keeps_the_answers_in_step(run: Run, serve: Serve, folder: Path) -> None:
    server = serve({BOB_TO: UNKNOWN, f"MAIL FROM:<{CAROL}": LATER, "DATA": "354 go"}, PIPELINING)
    files = letters(folder / "out", 6, Cc=f"{BOB}, {CAROL}")
    for path in files[::3]:
        path.write_bytes(mail(From_=CAROL))
    done = run("out", "--send_smtp", **to(server))
    assert [each.recipients for each in server.mails if each.content] == [[STEVET, CAROL]] * 4
    told = [f"(450, b'4.2.1 later', '{CAROL}')", *[f"{{'{BOB}': (550, b'5.1.1 unknown')}}"] * 2]
    assert [line.split(": ", 2)[2] for line in done.stderr.decode().splitlines()] == told * 2
    assert (done.returncode, done.stdout.count(b"OK for 2 of 3 recipients")) == (1, 4)


# ------------------------------------------------------------------------------------------------- too many recipients


@pytest.fixture(name="extensions", params=[[], [PIPELINING]], ids=["step by step", "pipelining"])
def choose_extensions(request: pytest.FixtureRequest) -> list[str]:
    return list(request.param)


def test_too_many_recipients_are_split_into_further_transactions(
    extensions: list[str], send: Send, serve: Serve
) -> None:
    recipients = [f"r{number}@thetucks.com" for number in range(10)]
    server = serve(Limit(4).answers, *extensions)
    outcome = send(server, mail(To=", ".join(recipients)))
    assert (outcome.code, outcome.err) == (0, "")
    assert [each.recipients for each in server.mails] == [recipients[:4], recipients[4:8], recipients[8:]]
    assert len({each.content for each in server.mails}) == 1
    assert "\nOK - in" in outcome.out


def test_an_encrypted_message_is_split_too_and_opens_everywhere(
    extensions: list[str], send: Send, serve: Serve, openssl: Openssl, authority: Authority
) -> None:
    server = serve(Limit(2).answers, *extensions)
    assert send(server, TO_THREE, "--encrypt").code == 0
    assert [each.recipients for each in server.mails] == [[STEVET, BOB], [CAROL]]
    assert b"Hello Steve" in openssl.decrypt(inner(server.mails[1].content), authority.identity(CAROL))


@pytest.mark.parametrize("answer", [MANY, "452 4.2.2 mailbox full"])
def test_one_who_is_refused_in_the_further_transaction_too_is_told(
    answer: str, extensions: list[str], send: Send, serve: Serve
) -> None:
    server = serve({BOB_TO: answer}, *extensions)
    outcome = send(server, TO_THREE)
    assert [each.recipients for each in server.mails if each.content] == [[STEVET, CAROL]]
    assert outcome.err == f"{{'{BOB}': (452, b'{answer[4:]}')}}\n"
    assert (outcome.code, "\nOK for 2 of 3 recipients" in outcome.out) == (1, True)
    assert server.heard.count(b"RCPT TO:<bob") == 2


def test_too_many_recipients_from_the_first_on_is_a_temporary_failure(
    extensions: list[str], send: Send, serve: Serve
) -> None:
    server = serve({"RCPT": MANY}, *extensions)
    outcome = send(server, TO_THREE)
    assert (outcome.code, [each for each in server.mails if each.content]) == (75, [])
    assert outcome.err.count("4.5.3 too many recipients") == 3
    assert server.heard.count(b"MAIL FROM") == 1


def test_other_refusals_are_not_asked_again_in_the_further_transaction(
    extensions: list[str], send: Send, serve: Serve
) -> None:
    server = serve({BOB_TO: UNKNOWN, **Limit(1).answers}, *extensions)
    outcome = send(server, TO_THREE)
    assert [each.recipients for each in server.mails] == [[STEVET], [CAROL]]
    assert (outcome.code, outcome.err) == (1, f"{{'{BOB}': (550, b'5.1.1 unknown')}}\n")
    assert server.heard.count(b"RCPT TO:<bob") == 1


def test_a_connection_lost_in_the_further_transaction_keeps_a_further_copy_back(
    extensions: list[str], send: Send, serve: Serve
) -> None:
    server: Faulty = serve(
        {**Limit(1).answers, "dot": lambda _: Fault.DROP if len(server.mails) == 2 else "250 ok"}, *extensions
    )
    outcome = send(server, mail(To=f"{STEVET}, {BOB}", Bcc=CAROL), "--encrypt")
    assert "\nOK for 1 of 3 recipients" in outcome.out
    assert (outcome.code, outcome.err.count("may have been sent")) == (1, 1)
    assert f"perhaps not sent to {BOB}, {CAROL}" in outcome.err


@pytest.mark.parametrize("second", ["MAIL", "dot"])
def test_a_further_transaction_that_fails_does_not_undo_the_first(
    second: str, extensions: list[str], send: Send, serve: Serve
) -> None:
    server: Faulty
    limit = Limit(2)

    def refuse_second(stage: str) -> str:
        good = limit.begin(stage) if second == "MAIL" else "250 2.0.0 queued"
        return "451 4.3.0 later" if len(server.mails) == (1 if second == "MAIL" else 2) else good

    server = serve({**limit.answers, second: refuse_second}, *extensions)
    outcome = send(server, TO_THREE)
    assert "\nOK for 2 of 3 recipients" in outcome.out
    assert "4.3.0 later" in outcome.err
    assert CAROL in outcome.err
    assert outcome.code == 1
