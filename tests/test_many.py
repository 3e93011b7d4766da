"""Many messages in one run: what is told of them, the exit code over all, and the connections they share."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import trustme
from conftest import API_KEY, BOB, CAROL, PASSWORD, SCRIPT, STEVE, STEVET, Run, mail
from faulty import (  # the fixtures among them are used by name
    QUICK,
    Answer,
    Fault,
    Faulty,
    LastWord,
    Mailbox,
    Serve,
    patched,
    sometimes,
    start_faulty,  # noqa: F401
)
from pki import Authority
from readers import Openssl
from servers import free_port, wait_for
from test_api import Handler, StandIn, accepted, reply
from test_readers import inner

SUMMARY = r"Sent {} of {} messages in \d+\.\d seconds \(\d+ per second\)"
BANNER = r"Opened SMTP connection \(plain\)\nHost: localhost\nPort: \d+\nUser: \"\"\nPassword: \"\"\n"
MESSAGE = rf"Sending: {{}}\nFrom: Steve <{STEVE}>\nTo: SteveT <{STEVET}>\n"
SendMany = Callable[..., "subprocess.CompletedProcess[bytes]"]
OK = r"OK - in \d+\.\d{3} seconds\n"
NOBODY = "nobody@thetucks.com"
LATER, SPAM, BUSY = "451 4.3.0 later", "554 5.7.1 spam", "421 4.3.2 too busy"


def to(server: Faulty | Mailbox) -> dict[str, str]:
    """The variables for sending to a server."""
    return dict(SMTP_HOST="localhost", SMTP_PORT=str(server.port))


def letters(folder: Path, count: int, **fields: str) -> list[Path]:
    """A folder of so many messages, each with a token in the Subject; {} in a field stands for its number."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:05}.eml" for number in range(1, count + 1)]
    for number, path in enumerate(paths, 1):
        header = {name: text.format(number) for name, text in fields.items()}
        path.write_bytes(mail(f"Letter {number}\r\n".encode() * 20, Subject=f"token-{number:05}", **header))
    return paths


def token(message: bytes) -> str:
    """The token in a message's Subject, which is also the name of its file."""
    found = re.search(rb"(?m)^Subject: token-(\d+)", message)
    assert found, message[:500]
    return found[1].decode()


def taken(server: Faulty) -> list[str]:
    """The tokens of the messages that a server took, in order."""
    return [token(each.content) for each in server.mails if each.recipients or each.content]


def names(paths: Iterable[Path]) -> list[str]:
    """The tokens of these files, in order."""
    return sorted(path.stem for path in paths)


def connections(server: Faulty) -> list[bytes]:
    """What was said on each connection after EHLO, once all are gone."""
    return re.split(rb"(?m)^ehlo [^\n]*\n", server.heard)[1:]


def slow(seconds: float) -> Answer:
    """A good answer to the dot that lets the client wait."""
    return lambda stage: time.sleep(seconds) or "250 2.0.0 queued"  # type: ignore[func-returns-value]


# --------------------------------------------------------------------------------------------- what is sent and told


def test_every_message_is_told_as_if_alone_and_a_last_line_sums_up(run: Run, serve: Serve, folder: Path) -> None:
    server, files = serve(), letters(folder / "out", 3)
    done = run(*files, "--send_smtp", **to(server))
    told = BANNER + "".join(MESSAGE.format(re.escape(str(file))) + OK for file in files)
    assert re.fullmatch(told + SUMMARY.format(3, 3) + "\n", done.stdout.decode())
    assert (done.returncode, done.stderr, taken(server)) == (0, b"", names(files))


def test_a_folder_stands_for_its_messages_in_name_order(run: Run, serve: Serve, folder: Path) -> None:
    server, files = serve(), letters(folder / "out", 12)
    for name in ("00000.txt", "00000.eml~", ".00000.eml.tmp", ".00000.eml"):
        (folder / "out" / name).write_bytes(mail())
    (folder / "out" / "deeper").mkdir()
    (folder / "out" / "deeper" / "00000.eml").write_bytes(mail())
    (alone,) = letters(folder / "b", 1)
    done = run(alone, "out", "--send_smtp", **to(server))
    assert taken(server) == ["00001", *names(files)]
    sent = [f"Sending: {path}" for path in (alone, *(f"out/{file.name}" for file in files))]
    assert re.findall("(?m)^Sending: .*", done.stdout.decode()) == sent


@pytest.mark.parametrize(
    ("options", "code", "out", "err"),
    [
        ([], 1, "", "sparkpostSMIME.py: out: .*\n"),
        (["--sent", "sent"], 0, SUMMARY.format(0, 0) + "\n", ""),
        (["--sent", "sent", "--quiet"], 0, "", ""),
    ],
    ids=str,
)
def test_only_an_outbox_may_be_empty(
    options: list[str], code: int, out: str, err: str, run: Run, serve: Serve, folder: Path
) -> None:
    for name in ("out", "sent"):
        (folder / name).mkdir()
    server = serve()
    done = run("out", "--send_smtp", *options, **to(server))
    assert (done.returncode, server.lines) == (code, [])
    assert re.fullmatch(out, done.stdout.decode())
    assert re.fullmatch(err, done.stderr.decode())


def test_printed_messages_have_nothing_else_around_them(run: Run, folder: Path) -> None:
    files = letters(folder / "out", 2, Date="Mon, 24 Nov 2025 10:00:00 +0000", Message_ID="<{}@thetucks.com>")
    alone = [run(file).stdout for file in files]
    together = run(*files)
    assert (together.returncode, together.stdout, together.stderr) == (0, b"".join(alone), b"")


@pytest.mark.parametrize("jobs", ["1", "4"])
def test_one_failure_never_stops_the_others(jobs: str, run: Run, serve: Serve, folder: Path) -> None:
    server, files = serve(), letters(folder / "out", 8)
    files[0].write_bytes(mail(From_="nobody"))
    files[2].write_bytes(mail(To=None))
    files[4].unlink()
    done = run(*files, "--send_smtp", "--jobs", jobs, **to(server))
    assert sorted(taken(server)) == ["00002", "00004", "00006", "00007", "00008"]
    assert re.search(SUMMARY.format(5, 8) + r", 3 refused\n\Z", done.stdout.decode())
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 3)
    assert b"00005.eml: No such file" in done.stderr


@pytest.mark.parametrize(
    ("answers", "code", "ending"),
    [
        ({}, 0, "Sent 3 of 3 .*second\\)"),
        ({"MAIL FROM:<m2@": LATER}, 75, "Sent 2 of 3 .*second\\), 1 to try again"),
        ({"MAIL FROM:<m2@": SPAM}, 1, "Sent 2 of 3 .*second\\), 1 refused"),
        ({"MAIL FROM:<m2@": SPAM, "MAIL FROM:<m3@": LATER}, 1, "Sent 1 of 3 .*second\\), 1 refused, 1 to try again"),
        ({"MAIL FROM:<m1@": LATER, "MAIL FROM:<m2@": SPAM}, 1, "Sent 1 of 3 .*second\\), 1 refused, 1 to try again"),
        ({"MAIL": LATER}, 75, "Sent 0 of 3 .*second\\), 3 to try again"),
        ({"dot": SPAM}, 1, "Sent 0 of 3 .*second\\), 3 refused"),
    ],
)
@pytest.mark.parametrize("quiet", [False, True], ids=["loud", "quiet"])
def test_exit_code_and_last_line_over_all(
    answers: dict[str, Answer], code: int, ending: str, quiet: bool, run: Run, serve: Serve, folder: Path
) -> None:
    letters(folder / "out", 3, From_="m{}@thetucks.com")
    done = run("out", "--send_smtp", *["--quiet"] * quiet, **to(serve(answers)))
    assert (done.returncode, b"Sending: " in done.stdout) == (code, not quiet)
    lines = (done.stdout + done.stderr).decode().splitlines()
    last = [line for line in lines if line.startswith("Sent ")]
    assert [bool(re.fullmatch(ending, line)) for line in last] == [True] * (not quiet or code != 0)
    errors = [line for line in done.stderr.decode().splitlines() if line not in last]
    assert len(errors) == 3 - int(ending.split()[1])
    assert all(re.fullmatch(r"sparkpostSMIME\.py: out/\d+\.eml: \(.*\)", line) for line in errors)
    assert not quiet or done.stdout.decode().splitlines() in ([], last)


@pytest.mark.parametrize(
    ("stage", "answer", "each"),
    [("MAIL", LATER, 7), ("RCPT", LATER, 7), ("DATA", LATER, 7), ("dot", LATER, 7), ("dot", SPAM, 3)],
)
@pytest.mark.parametrize("extensions", [[], ["PIPELINING"]], ids=str)
def test_one_refusal_in_so_many_costs_that_message_alone(
    stage: str, answer: str, each: int, extensions: list[str], run: Run, serve: Serve, folder: Path
) -> None:
    server = serve({stage: sometimes(answer, lambda number: number % each == 0)}, *extensions)
    files = letters(folder / "out", 21)
    done = run("out", "--send_smtp", **to(server))
    kept = [name for number, name in enumerate(names(files), 1) if number % each or stage == "dot"]
    assert [token(mail.content) for mail in server.mails if mail.content] == kept
    failed, code, ending = 21 // each, *((75, "to try again") if answer == LATER else (1, "refused"))
    assert re.search(SUMMARY.format(21 - failed, 21) + f", {failed} {ending}\n\\Z", done.stdout.decode())
    assert (done.returncode, done.stderr.count(answer[4:].encode())) == (code, failed)
    assert len(connections(server)) == 1


def test_the_lines_of_one_message_stay_together_among_several_workers(run: Run, serve: Serve, folder: Path) -> None:
    server, files = serve({"dot": slow(0.03)}), letters(folder / "out", 24)
    done = run("out", "--send_smtp", "--jobs", "4", **to(server))
    told, opened = re.subn(BANNER, "", done.stdout.decode())
    assert re.fullmatch(f"(?:{MESSAGE.format('out/.*')}{OK})+{SUMMARY.format(24, 24)}\n", told)
    assert sorted(re.findall(r"out/(\d+)", told)) == sorted(taken(server)) == names(files)
    assert opened == len(connections(server)) == 4


@pytest.mark.parametrize("jobs", ["1", "4"])
def test_printed_messages_are_whole_whoever_makes_them(jobs: str, run: Run, folder: Path) -> None:
    files = letters(folder / "out", 6, Date="Mon, 24 Nov 2025 10:00:00 +0000", Message_ID="<{}@thetucks.com>")
    for path in files:
        path.write_bytes(path.read_bytes() + b"A line of text.\r\n" * 30_000)  # more than a pipe holds
    alone = [run(file).stdout for file in files]
    together = run(*files, "--jobs", jobs).stdout
    assert sorted(re.split(b"(?m)^(?=From: )", together)[1:]) == alone


def test_a_message_is_printed_whole_to_whoever_reads_slowly(folder: Path) -> None:
    (folder / "m.eml").write_bytes(mail(b"A line of text.\r\n" * 60_000))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen([sys.executable, SCRIPT, "m.eml"], cwd=folder, stdout=writing, stderr=subprocess.PIPE) as run:
        os.close(writing)
        time.sleep(1)
        with open(reading, "rb") as output:
            assert output.read().endswith(b"A line of text.\r\n" * 60_000)
        assert (run.stderr and run.stderr.read(), run.wait()) == (b"", 0)


def run_after(command: str, arguments: str, server: Faulty, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run the program in place of a shell that ran this command, such as ulimit, before."""
    words = f'{command}; exec "{sys.executable}" "{SCRIPT}" {arguments}'
    return subprocess.run(["bash", "-c", words], cwd=folder, env=to(server), capture_output=True, timeout=60)


def test_more_jobs_than_the_system_allows_are_refused_before_anything_is_sent(serve: Serve, folder: Path) -> None:
    server = serve()
    letters(folder / "out", 60)
    done = run_after("ulimit -n 40", "out --send_smtp --jobs 50", server, folder)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"sparkpostSMIME.py: --jobs 50: Too many open files - name fewer\n"
    assert not server.mails


def test_a_caller_that_ignores_the_end_of_its_children_changes_nothing(serve: Serve, folder: Path) -> None:
    server = serve()
    letters(folder / "out", 6)
    done = run_after("trap '' CHLD", "out --send_smtp --jobs 3", server, folder)
    assert (done.returncode, done.stderr, len(server.mails)) == (0, b"", 6)
    assert b"Sent 6 of 6 messages" in done.stdout


def test_without_room_for_the_list_of_the_files_nothing_is_sent(serve: Serve, folder: Path) -> None:
    server = serve()
    letters(folder / "out", 2)
    done = run_after("ulimit -f 0", "out --send_smtp --jobs 2", server, folder)
    assert (done.returncode, done.stdout, server.mails) == (1, b"", [])
    assert re.fullmatch(rb"sparkpostSMIME\.py: a temporary file: [^\n]* - make room for it, [^\n]*\n", done.stderr)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_message_too_large_for_the_memory_stops_no_other(jobs: str, serve: Serve, folder: Path) -> None:
    server = serve()
    files = letters(folder / "out", 4)
    os.truncate(files[1], 700 << 20)
    done = run_after(f"ulimit -v {1 << 20}", f"out --send_smtp --quiet --jobs {jobs}", server, folder)
    assert (done.returncode, len(server.mails)) == (1, 3)
    what = b"sparkpostSMIME.py: %b: there is not enough memory for this message\n"
    assert done.stderr == what % os.fsencode(files[1].relative_to(folder))


@pytest.mark.parametrize("jobs", ["0", "-1", "x", "1.5", ""])
def test_a_number_of_jobs_that_is_none_is_a_wrong_command_line(jobs: str, run: Run, serve: Serve) -> None:
    server = serve()
    done = run("-", "--send_smtp", f"--jobs={jobs}", data=mail(), **to(server))
    assert (done.returncode, server.lines) == (2, [])
    assert b"--jobs" in done.stderr


# ------------------------------------------------------------------------------------------------------- --report


def test_the_report_has_an_object_for_every_message(run: Run, serve: Serve, folder: Path) -> None:
    server = serve({"RCPT TO:<bob": "550 5.1.1 unknown", "MAIL FROM:<m3@": LATER})
    files = letters(folder / "out", 3, From_="m{}@thetucks.com", Message_ID="<n{}@thetucks.com>")
    files[1].write_bytes(mail(From_="m2@thetucks.com", To=STEVET, Cc=BOB, Message_ID="<n2@thetucks.com>"))
    done = run("out", "absent.eml", "--send_smtp", "--report", "report", **to(server))
    assert done.returncode == 1
    assert (folder / "report").stat().st_mode & 0o777 == 0o600
    objects = [json.loads(line) for line in (folder / "report").read_text().splitlines()]
    keys = ["file", "message_id", "sender", "accepted", "refused", "error", "id", "seconds", "attempts"]
    assert [sorted(each) for each in objects] == [sorted(keys)] * 4
    assert [each["file"] for each in objects] == ["out/00001.eml", "out/00002.eml", "out/00003.eml", "absent.eml"]
    assert [each["sender"] for each in objects[:3]] == [f"m{number}@thetucks.com" for number in (1, 2, 3)]
    assert [str(each["message_id"]).strip("<>") for each in objects[:3]] == [f"n{n}@thetucks.com" for n in (1, 2, 3)]
    assert [each["accepted"] for each in objects] == [[STEVET], [STEVET], [], []]
    assert (objects[0]["refused"], list(objects[1]["refused"])) == ({}, [BOB])
    assert re.search(r"\b550\b.*5\.1\.1 unknown", objects[1]["refused"][BOB])
    assert objects[0]["error"] is None
    assert "4.3.0 later" in objects[2]["error"]
    assert "absent.eml" in objects[3]["error"]
    assert [each["id"] for each in objects] == [None] * 4
    assert [each["attempts"] for each in objects[:3]] == [1, 1, 1]
    assert all(0 <= each["seconds"] < 20 for each in objects)


def test_the_report_tells_everybodys_own_reply(run: Run, serve: Serve, folder: Path) -> None:
    server = serve({f"RCPT TO:<{STEVET}": "550 5.1.1 unknown", f"RCPT TO:<{BOB}": LATER})
    data = mail(To=f"{STEVET}, {BOB}")
    assert run("-", "--send_smtp", "--report", "report", data=data, **to(server)).returncode == 1
    refused = json.loads((folder / "report").read_text())["refused"]
    assert refused == {STEVET: "(550, b'5.1.1 unknown')", BOB: "(451, b'4.3.0 later')"}


@pytest.mark.parametrize(
    ("recipient", "identifier", "sender"),
    [(NOBODY, "<n1@thetucks.com>", STEVE), (NOBODY, None, STEVE), ("@", "<n1@thetucks.com>", None)],
    ids=["no certificate", "no Message-ID", "unreadable"],
)
def test_the_report_names_a_message_that_cannot_be_sent(
    recipient: str, identifier: str | None, sender: str | None, run: Run, serve: Serve, folder: Path
) -> None:
    (folder / "a.eml").write_bytes(mail(To=recipient, Message_ID=identifier))
    assert run("a.eml", "--encrypt", "--send_smtp", "--report", "report", **to(serve())).returncode == 1
    record = json.loads((folder / "report").read_text())
    assert (record["message_id"], record["sender"], record["attempts"]) == (identifier, sender, 0)
    assert recipient in record["error"]


def test_the_report_grows_as_messages_end_and_from_run_to_run(run: Run, serve: Serve, folder: Path) -> None:
    report, numbers = folder / "report", iter(range(5))

    def expect_line_before(stage: str) -> str:
        number = next(numbers)
        wait_for(lambda: (report.read_text().count("\n") if report.exists() else 0) == number, 5)
        return "250 2.0.0 ok"

    server = serve({"MAIL": expect_line_before})
    letters(folder / "out", 2)
    for _ in range(2):
        assert run("out", "--send_smtp", "--report", report, **to(server)).returncode == 0
    assert [json.loads(line)["file"] for line in report.read_text().splitlines()] == [
        "out/00001.eml",
        "out/00002.eml",
    ] * 2


def test_workers_share_the_report(run: Run, serve: Serve, folder: Path) -> None:
    files = letters(folder / "out", 24)
    assert run("out", "--send_smtp", "--quiet", "--report", "r", "--jobs", "4", **to(serve())).returncode == 0
    objects = [json.loads(line) for line in (folder / "r").read_text().splitlines()]
    assert sorted(each["file"] for each in objects) == [f"out/{file.name}" for file in files]


def test_a_report_that_cannot_be_opened_stops_all_before_anything_is_sent(run: Run, serve: Serve, folder: Path) -> None:
    server = serve()
    letters(folder / "out", 2)
    done = run("out", "--send_smtp", "--report", "absent/report", **to(server))
    assert (done.returncode, server.mails) == (1, [])
    assert b"absent/report" in done.stderr


def test_a_report_on_a_full_disk_is_told_and_stops_no_message(run: Run, serve: Serve, folder: Path) -> None:
    server, files = serve(), letters(folder / "out", 3)
    done = run("out", "--send_smtp", "--report", "/dev/full", **to(server))
    assert taken(server) == names(files)
    assert b"/dev/full: No space left" in done.stderr


def test_a_report_that_is_written_in_part_is_told(serve: Serve, folder: Path) -> None:
    letters(folder / "out", 5)  # whose last line is over the limit
    done = run_after("ulimit -f 1", "out --send_smtp --report report", serve(), folder)
    assert (folder / "report").stat().st_size == 1024
    assert done.returncode == 1
    assert done.stderr == b"sparkpostSMIME.py: report: File too large - the report is not complete\n"


def test_open_files_without_number_do_no_harm(serve: Serve, folder: Path) -> None:
    letters(folder / "out", 2)
    server = serve()
    opening = 'ulimit -n 2000; for number in {3..1100}; do eval "exec $number</dev/null"; done'
    done = run_after(opening, "out --send_smtp --report report", server, folder)
    assert (done.returncode, done.stderr, taken(server)) == (0, b"", ["00001", "00002"])
    assert len((folder / "report").read_text().splitlines()) == 2


def test_the_report_names_a_message_for_which_there_was_no_connection(run: Run, folder: Path) -> None:
    letters(folder / "out", 1, Message_ID="<n{}@thetucks.com>")
    variables = dict(SMTP_HOST="localhost", SMTP_PORT=str(free_port()))
    assert run("out", "--send_smtp", "--report", "report", **variables).returncode == 75
    record = json.loads((folder / "report").read_text())
    assert (record["message_id"], record["sender"], record["attempts"]) == ("<n1@thetucks.com>", STEVE, 0)
    assert list(record["refused"]) == [STEVET]
    assert "Connection refused" in record["refused"][STEVET]


# ------------------------------------------------------------------------------------------------------- progress


def on_terminal(folder: Path, *arguments: str | Path, out: bool, **variables: str) -> tuple[str, str]:
    """Run the program with stderr on a terminal, and with `out` stdout too; what the terminal and a pipe got."""
    ours, theirs = pty.openpty()
    words = [sys.executable, str(SCRIPT), *map(str, arguments)]
    stdout = theirs if out else subprocess.PIPE
    with subprocess.Popen(words, cwd=folder, env=variables, stdin=theirs, stdout=stdout, stderr=theirs) as process:
        os.close(theirs)
        output = b""
        while chunk := read_terminal(ours):
            output += chunk
        piped = process.stdout.read() if process.stdout else b""
    os.close(ours)
    return output.decode(), piped.decode()


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux's way to say that the other side is closed
        return b""


def screen(output: str) -> str:
    """What a terminal shows of it in the end."""
    lines = []
    for line in output.split("\n"):
        shown, column = "", 0
        for part in re.split(r"(\r|\x1b\[[02]?K)", line):
            if part == "\r":
                column = 0
            elif part.startswith("\x1b"):
                shown = " " * column if "2" in part else shown[:column]
            else:
                shown = shown[:column].ljust(column) + part + shown[column + len(part) :]
                column += len(part)
        lines.append(shown.rstrip())
    return "\n".join(lines)


def steady(text: str) -> str:
    """Without what differs from run to run."""
    return re.sub(r"\d+\.\d+ seconds|\d+ per second|Port: \d+", "N", text)


@pytest.mark.parametrize("out", [False, True], ids=["stderr", "stdout and stderr"])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_the_progress_line_leaves_nothing_behind(jobs: str, out: bool, run: Run, serve: Serve, folder: Path) -> None:
    server = serve({"MAIL FROM:<m2@": SPAM, "dot": slow(0.1)})
    files = letters(folder / "out", 5, From_="m{}@thetucks.com")
    arguments: list[str | Path] = [*files, "--send_smtp", "--jobs", jobs]
    output, piped = on_terminal(folder, *arguments, out=out, **to(server))
    assert re.search(r"[1-4] of 5 done, 1 failed, \d+ per second, \d+ s left", output)
    assert "of 5 done" not in piped
    plain = run(*arguments, **to(server))
    assert b"\r" not in plain.stdout + plain.stderr
    expected = plain.stderr.decode() + (plain.stdout.decode() if out else "")
    assert Counter(steady(screen(output)).split()) == Counter(steady(expected).split())
    assert "of 5 done" not in screen(output)


@pytest.mark.parametrize(("count", "quiet"), [(1, False), (3, True)], ids=["one message", "quiet"])
def test_no_progress_line_where_none_is_wanted(count: int, quiet: bool, serve: Serve, folder: Path) -> None:
    letters(folder / "out", count)
    output, _ = on_terminal(
        folder, "out", "--send_smtp", *["--quiet"] * quiet, out=False, **to(serve({"dot": slow(0.1)}))
    )
    assert screen(output) == ""
    assert quiet or not output


# ---------------------------------------------------------------------------------------------- --recipient, sender


def test_recipients_of_the_command_line_replace_the_headers(run: Run, serve: Serve, folder: Path) -> None:
    server = serve()
    message = mail(To=STEVET, Cc=BOB, Bcc=STEVE)
    done = run("-", "--send_smtp", "--recipient", BOB, "--recipient", CAROL, data=message, **to(server))
    assert (done.returncode, done.stderr) == (0, b"")
    assert [each.recipients for each in server.mails] == [[BOB, CAROL]]
    content = server.mails[0].content
    assert f"To: {STEVET}\r\n".encode() in content
    assert f"Cc: {BOB}\r\n".encode() in content
    assert CAROL.encode() not in content
    assert b"Bcc" not in content


def test_a_recipient_that_the_header_does_not_show_gets_an_encrypted_copy_alone(
    run: Run, serve: Serve, folder: Path, openssl: Openssl, authority: Authority
) -> None:
    (folder / f"{STEVET}.crt").unlink()  # not a recipient any more, so not needed
    server = serve()
    arguments = ("--sign", "--encrypt", "--recipient", BOB, "--recipient", CAROL)
    done = run("-", "--send_smtp", *arguments, data=mail(To=STEVET, Cc=BOB, Bcc=STEVE), **to(server))
    assert (done.returncode, done.stderr) == (0, b"")
    assert [each.recipients for each in server.mails] == [[BOB], [CAROL]]
    for each, reader, other in zip(server.mails, (BOB, CAROL), (CAROL, BOB), strict=True):
        assert b"Hello Steve" in openssl.verify(openssl.decrypt(inner(each.content), authority.identity(reader)))
        with pytest.raises(AssertionError):
            openssl.decrypt(inner(each.content), authority.identity(other))


def test_a_recipient_that_is_no_text_is_refused(run: Run) -> None:
    done = run("-", "--sign", "--recipient", os.fsdecode(b"a\xff@b.c"), data=mail())
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_a_message_without_recipients_in_its_header_can_be_given_some(run: Run, serve: Serve) -> None:
    server = serve()
    arguments = ("--recipient", BOB, "--return_path", "<>")
    assert run("-", "--send_smtp", *arguments, data=mail(To=None), **to(server)).returncode == 0
    assert [(each.sender, each.recipients) for each in server.mails] == [("", [BOB])]


@pytest.mark.parametrize("address", ["", "nobody", "a@b\r\nRCPT TO:<c@d>", "a@b> SIZE=1"])
def test_a_recipient_that_is_no_address_is_refused(address: str, run: Run, serve: Serve) -> None:
    server = serve()
    done = run("-", "--send_smtp", "--recipient", address, data=mail(), **to(server))
    assert done.returncode in (1, 2)
    assert server.mails == []
    assert b"--recipient holds an address that cannot be read" in done.stderr


# ---------------------------------------------------------------------------------------------- SMTP connections


def test_a_connection_is_left_after_100_messages(run: Run, serve: Serve, folder: Path) -> None:
    server, files = serve({}, "PIPELINING"), letters(folder / "out", 205)
    done = run("out", "--send_smtp", **to(server))
    assert (done.returncode, done.stderr, taken(server)) == (0, b"", names(files))
    assert [said.count(b"MAIL FROM:") for said in connections(server)] == [100, 100, 5]
    assert [said.lower().count(b"quit") for said in connections(server)] == [1, 1, 1]
    assert len(re.findall(BANNER, done.stdout.decode())) == 3


@pytest.mark.parametrize("extensions", [[], ["PIPELINING"]], ids=str)
@pytest.mark.parametrize(
    ("stage", "answer"),
    [
        ("dot", LastWord("250 2.0.0 queued")),
        ("MAIL", Fault.DROP),
        ("MAIL", LastWord(BUSY)),
        ("RCPT", Fault.DROP),
        ("DATA", Fault.DROP),
    ],
    ids=str,
)
def test_a_connection_that_the_server_closes_now_and_then_is_opened_anew(
    stage: str, answer: str | Fault, extensions: list[str], run: Run, serve: Serve, folder: Path
) -> None:
    server = serve({stage: sometimes(answer, lambda number: number % 4 == 0)}, *extensions)
    files = letters(folder / "out", 10)
    done = run("out", "--send_smtp", **to(server))
    assert (done.returncode, done.stderr, taken(server)) == (0, b"", names(files))
    assert len(connections(server)) > 2


def test_a_server_that_breaks_off_at_once_now_and_then_loses_no_message(run: Run, serve: Serve, folder: Path) -> None:
    server = serve(
        {
            "connect": sometimes(Fault.DROP, lambda number: number % 3 == 0),
            "MAIL": sometimes(Fault.DROP, lambda number: number % 4 == 0),
        }
    )
    letters(folder / "out", 12)
    done = run("out", "--send_smtp", **to(server))
    sent = int(re.findall(r"(?m)^Sent (\d+) of 12 messages", done.stdout.decode())[0])
    assert sent == len(taken(server)) == len(set(taken(server))) >= 8
    assert done.returncode == (0 if sent == 12 else 75)


def test_a_message_that_breaks_every_connection_is_tried_twice_and_the_others_go(
    run: Run, serve: Serve, folder: Path
) -> None:
    server = serve({"MAIL FROM:<m2@": Fault.DROP})
    letters(folder / "out", 4, From_="m{}@thetucks.com")
    done = run("out", "--send_smtp", "--report", "report", **to(server))
    assert (done.returncode, taken(server)) == (75, ["00001", "00003", "00004"])
    assert re.fullmatch(r"sparkpostSMIME\.py: out/00002\.eml: localhost port \d+: .*\n", done.stderr.decode())
    objects = [json.loads(line) for line in (folder / "report").read_text().splitlines()]
    assert [each["attempts"] for each in objects] == [1, 2, 1, 1]
    assert server.heard.count(b"MAIL FROM:<m2@") == 2


def test_a_message_that_may_have_been_sent_is_not_sent_again_and_the_others_go(
    run: Run, serve: Serve, folder: Path
) -> None:
    server = serve({"dot": sometimes(Fault.DROP, lambda number: number == 2)})
    files = letters(folder / "out", 4)
    done = run("out", "--send_smtp", **to(server))
    assert (done.returncode, taken(server)) == (75, names(files))
    assert done.stderr.count(b"may have been sent") == len(done.stderr.splitlines()) == 1
    assert re.search(SUMMARY.format(3, 4) + r", 1 to try again\n\Z", done.stdout.decode())


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_server_out_of_reach_is_given_up_after_three_messages(jobs: str, run: Run, folder: Path) -> None:
    letters(folder / "out", 40)
    done = run("out", "--send_smtp", "--jobs", jobs, SMTP_HOST="localhost", SMTP_PORT=str(free_port()))
    assert done.returncode == 75
    assert 3 <= done.stderr.count(b"Connection refused") <= 3 * int(jobs)  # each worker finds out
    assert done.stderr.count(b"3 messages in a row found no way into the server: the rest is not tried") == 1
    assert re.search(SUMMARY.format(0, 40) + r", 40 to try again\n\Z", done.stdout.decode())


def test_a_worker_that_gives_up_leaves_the_rest_to_the_others(run: Run, serve: Serve, folder: Path) -> None:
    server: Faulty = serve(
        {"connect": lambda _: LastWord(BUSY) if server.busy > 1 else "220 mx.tests.example ESMTP", "dot": slow(0.02)}
    )
    files = letters(folder / "out", 40)
    done = run("out", "--send_smtp", "--jobs", "2", **to(server))
    assert (done.returncode, len(done.stderr.splitlines())) == (75, done.stderr.count(b"too busy"))
    assert 37 <= len(set(taken(server))) == len(server.mails) < len(files)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_login_that_is_refused_is_tried_for_three_messages_only(
    jobs: str, run: Run, serve: Serve, folder: Path
) -> None:
    server = serve({"AUTH": "535 5.7.8 wrong"}, "AUTH PLAIN")
    letters(folder / "out", 40, Bcc=CAROL)
    done = run("out", "--send_smtp", "--encrypt", "--jobs", jobs, **to(server), SMTP_USER="me", SMTP_PASSWORD=PASSWORD)
    assert (done.returncode, server.mails) == (1, [])
    assert 3 <= server.heard.count(b"AUTH PLAIN") <= 3 * int(jobs)
    assert done.stderr.count(b"5.7.8 wrong") == server.heard.count(b"AUTH PLAIN")


@pytest.mark.parametrize(("ca_file", "connections"), [("", 3), ("absent.pem", 0)], ids=["no AUTH", "no CA"])
def test_a_login_that_is_impossible_costs_few_connections(
    ca_file: str, connections: int, run: Run, serve: Serve, folder: Path
) -> None:
    server: Faulty = serve({"connect": lambda _: connected.append(1) or "220 mx.tests.example ESMTP"})
    connected: list[int] = []
    letters(folder / "out", 12)
    variables = dict(SMTP_USER="me", SMTP_PASSWORD=PASSWORD, SMTP_CA_FILE=ca_file)
    done = run("out", "--send_smtp", **to(server), **variables)
    assert (done.returncode, len(connected)) == (1, connections)
    assert len(done.stderr.splitlines()) == (4 if connections else 1)


@pytest.mark.parametrize("answer", [Fault.DROP, LastWord(BUSY)], ids=["dropped", "421"])
def test_messages_that_break_every_connection_do_not_keep_the_others_back(
    answer: str | Fault, run: Run, serve: Serve, folder: Path
) -> None:
    server = serve({"MAIL FROM:<bad@": answer})
    for path in letters(folder / "out", 7)[:5]:
        path.write_bytes(mail(From_="bad@thetucks.com"))
    done = run("out", "--send_smtp", **to(server))
    assert (done.returncode, taken(server)) == (75, ["00006", "00007"])


def test_a_message_that_gets_through_ends_the_row_of_those_that_do_not(run: Run, serve: Serve, folder: Path) -> None:
    busy = sometimes(LastWord(BUSY), lambda number: number % 2 == 1)
    server, files = serve({"connect": busy, "dot": LastWord("250 2.0.0 queued")}), letters(folder / "out", 8)
    done = run("out", "--send_smtp", **to(server))
    assert (done.returncode, taken(server)) == (75, names(files[1::2]))


# ----------------------------------------------------------------------------------------------- API connections


class Kept(Handler):
    """Keeps the connection, as the real API does."""

    protocol_version = "HTTP/1.1"


class Slow(Kept):
    def do_POST(self) -> None:
        time.sleep(0.03)
        super().do_POST()


class Narrow(Kept):
    """Refuses what is large before it has read it."""

    def do_POST(self) -> None:
        if int(self.headers["Content-Length"]) > 1_000_000:
            self.wfile.write(reply(413, b"", Connection="close"))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            super().do_POST()


class Halting(Kept):
    """Stops within its first answer, and goes on when the client has given it up."""

    def do_POST(self) -> None:
        first = not self.server.requests
        super().do_POST()
        if first:
            time.sleep(2)
            self.wfile.write(b"the rest")


class Closing(Kept):
    """Closes it after each third answer, without having said so."""

    def do_POST(self) -> None:
        super().do_POST()
        self.close_connection = len(self.server.requests) % 3 == 0
        if self.close_connection:
            self.connection.shutdown(socket.SHUT_RDWR)  # at once, before the client has its next message ready


@pytest.fixture(name="api")
def start_api(folder: Path) -> Iterator[StandIn]:
    """A stand-in for the API, whose certificate is vouched for in ca.pem."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    with StandIn(ca.issue_cert("localhost")) as server:
        yield server


@pytest.fixture(name="send_many")
def send_many_by_api(run: Run, folder: Path, api: StandIn) -> SendMany:
    """Send so many messages to the stand-in for the API, which has this handler and these answers."""

    def send_many(
        count: int, handler: type[Handler], *arguments: str, answers: Sequence[bytes] = (), lines: int = 0, **more: str
    ) -> subprocess.CompletedProcess[bytes]:
        for path in letters(folder / "out", count):
            path.write_bytes(path.read_bytes() + b"A line of text.\r\n" * lines)
        api.RequestHandlerClass = handler
        api.answers = [*answers] or api.answers
        variables = dict(SPARKPOST_API_KEY=API_KEY, SPARKPOST_HOST=api.url, SSL_CERT_FILE="ca.pem")
        return run("out", "--send_api", *arguments, **variables, **more)

    return send_many


@pytest.mark.parametrize(("handler", "connections"), [(Kept, 1), (Closing, 4), (Handler, 10)])
def test_a_connection_to_the_api_is_kept_until_the_server_closes_it(
    handler: type[Handler], connections: int, send_many: SendMany, api: StandIn
) -> None:
    done = send_many(10, handler, lines=50_000)  # takes long enough for the end of a connection to arrive
    assert (done.returncode, done.stderr) == (0, b"")
    assert [token(request.message) for request in api.requests] == [f"{number:05}" for number in range(1, 11)]
    assert api.connections == connections


@pytest.mark.parametrize(
    ("status", "message", "code"), [(400, "Told", 1), (429, "Told", 75), (503, "Told", 75), (400, "x" * 3_000_000, 1)]
)
def test_an_error_of_the_api_costs_one_message_alone(
    status: int, message: str, code: int, send_many: SendMany, api: StandIn
) -> None:
    done = send_many(4, Kept, answers=[accepted(1), reply(status, {"errors": [{"message": message}]}), accepted(1)])
    assert (done.returncode, len(api.requests)) == (code, 4)
    assert api.connections == (1 if message == "Told" else 2)  # what is too long is not read to the end
    assert len(done.stderr.splitlines()) == 1
    assert re.search(SUMMARY.format(3, 4), done.stdout.decode())


def test_a_request_that_may_have_been_served_is_not_repeated(send_many: SendMany, api: StandIn) -> None:
    done = send_many(4, Closing, answers=[accepted(1), accepted(1), b"", accepted(1)])
    assert (done.returncode, len(api.requests)) == (75, 4)
    assert done.stderr.count(b"may have been sent") == len(done.stderr.splitlines()) == 1
    assert re.search(SUMMARY.format(3, 4) + ", 1 to try again", done.stdout.decode())


def test_a_connection_to_the_api_is_left_after_15_minutes(api: StandIn, folder: Path) -> None:
    letters(folder / "out", 4)
    api.RequestHandlerClass = Kept
    patch = "assert program.CONNECTION_LIFE == 900; program.CONNECTION_LIFE = 0"
    words = [*patched(patch), "out", "--send_api"]
    variables = dict(SPARKPOST_API_KEY=API_KEY, SPARKPOST_HOST=api.url, SSL_CERT_FILE="ca.pem")
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, timeout=30)
    assert (done.returncode, len(api.requests), api.connections) == (0, 4, 4)


def test_a_key_that_the_api_refuses_is_tried_for_three_messages_only(send_many: SendMany, api: StandIn) -> None:
    done = send_many(12, Kept, answers=[reply(401, {"errors": [{"message": "Unauthorized."}]})])
    assert (done.returncode, len(api.requests)) == (1, 3)
    assert b"the rest is not tried" in done.stderr


def test_messages_that_the_api_forbids_do_not_keep_the_others_back(send_many: SendMany, api: StandIn) -> None:
    forbidden = reply(403, {"errors": [{"message": "Forbidden."}]})
    done = send_many(5, Kept, answers=[forbidden] * 3 + [accepted(1)])
    assert (done.returncode, len(api.requests)) == (1, 5)
    assert re.search(SUMMARY.format(2, 5) + ", 3 refused", done.stdout.decode())


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_large_messages_that_the_api_breaks_off_do_not_keep_the_others_back(
    secure: bool, run: Run, folder: Path
) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    for path in letters(folder / "out", 8)[:4]:
        path.write_bytes(path.read_bytes() + b"A line of text.\r\n" * 400_000)
    with StandIn(ca.issue_cert("localhost") if secure else None) as api:
        api.RequestHandlerClass = Narrow
        variables = dict(SPARKPOST_API_KEY=API_KEY, SPARKPOST_HOST=api.url, SSL_CERT_FILE="ca.pem")
        done = run("out", "--send_api", **variables)
    assert [token(request.message) for request in api.requests] == [f"{number:05}" for number in range(5, 9)]
    assert len(done.stderr.splitlines()) == 4


def test_an_api_that_ends_every_handshake_is_tried_for_three_messages_only(send_many: SendMany, api: StandIn) -> None:
    api.deaf = True
    done = send_many(12, Kept)
    assert (done.returncode, api.connections) == (75, 3)
    assert b"the rest is not tried" in done.stderr


def test_the_rest_of_a_reply_answers_no_other_request(api: StandIn, folder: Path) -> None:
    letters(folder / "out", 3)
    api.RequestHandlerClass = Halting
    api.answers = [accepted(1).replace(b"Content-Length: ", b"Content-Length: 1"), accepted(1)]
    words = [*patched(QUICK), "out", "--send_api"]
    variables = dict(SPARKPOST_API_KEY=API_KEY, SPARKPOST_HOST=api.url, SSL_CERT_FILE="ca.pem")
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, timeout=30)
    assert (done.returncode, len(api.requests), api.connections) == (75, 3, 2)
    assert done.stderr.count(b"the reply is cut short") == len(done.stderr.splitlines()) == 1


def test_workers_have_a_connection_to_the_api_each(send_many: SendMany, api: StandIn) -> None:
    done = send_many(12, Slow, "--jobs", "3")
    assert (done.returncode, api.connections) == (0, 3)
    assert sorted(token(request.message) for request in api.requests) == [f"{number:05}" for number in range(1, 13)]


def test_the_report_names_the_transmission(send_many: SendMany, folder: Path) -> None:
    send_many(2, Kept, "--report", "report")
    objects = [json.loads(line) for line in (folder / "report").read_text().splitlines()]
    assert [(each["id"], each["accepted"]) for each in objects] == [("11668787484950529", [STEVET])] * 2


def test_recipients_of_the_command_line_reach_the_api(send_many: SendMany, api: StandIn) -> None:
    done = send_many(2, Kept, "--recipient", BOB, "--recipient", CAROL, answers=[accepted(2)])
    assert (done.returncode, [request.recipients for request in api.requests]) == (0, [[BOB, CAROL]] * 2)


def test_one_tunnel_of_a_proxy_serves_all(send_many: SendMany, api: StandIn) -> None:
    with StandIn() as proxy:
        assert send_many(3, Kept, HTTPS_PROXY=proxy.url).returncode == 0
        assert (len(proxy.requests), len(api.requests)) == (1, 3)
