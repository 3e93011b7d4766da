"""A folder as an outbox (--sent): nothing is lost, and nothing is sent twice but what a kill -9 leaves in doubt."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from conftest import API_KEY, BOB, CAROL, SCRIPT, STEVE, STEVET, Run, mail, need
from faulty import (  # the fixtures among them are used by name
    Answer,
    Fault,
    Faulty,
    LastWord,
    Serve,
    patched,
    sometimes,
    start_faulty,  # noqa: F401
)
from pki import Authority
from readers import Openssl
from servers import Postfix, wait_for
from test_api import ERROR, StandIn, accepted, reply, results
from test_many import BUSY, LATER, SPAM, SUMMARY, letters, names, slow, taken, to, token
from test_readers import inner

Start = Callable[..., "subprocess.Popen[str]"]
SEND = ("out", "--send_smtp", "--sent", "sent")
FULL = """
def full(descriptor):
    raise OSError(28, "No space left on device")
program.os.fsync = full
"""
SHORT = """
send_content, messages = program.Session.send_content, []
def short(session, message):
    messages.append(message)
    if len(messages) == 2:
        session.send(message[:100])
        raise MemoryError
    return send_content(session, message)
program.Session.send_content = short
"""
DOOMED = """
import os
serve, first = program.serve, "first-worker"
def doomed(*arguments):
    try:
        os.close(os.open(first, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return serve(*arguments)
    os.kill(os.getpid(), 9)
program.serve = doomed
"""
TO_BOB = f"RCPT TO:<{BOB}"
TO_THREE = mail(To=f"{STEVET}, {BOB}", Bcc=CAROL)


@pytest.fixture
def out(folder: Path) -> Path:
    """An outbox beside the folder for what is sent."""
    (folder / "sent").mkdir()
    (folder / "out").mkdir()
    return folder / "out"


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start the program with a process group of its own; what is left of it at the end of the test is killed."""
    started = []

    def start(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def volume(out: Path) -> Iterator[Path]:
    """A small file system of its own with folders out and sent."""
    need("mount", "umount", root=True)
    path = out.parent / "volume"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", path], check=True)
    for name in ("out", "sent"):
        (path / name).mkdir()
    yield path
    subprocess.run(["umount", path], check=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """How it ended, workers and all: the pipes close when nobody has them any more."""
    stdout, stderr = process.communicate(timeout=30)
    assert "Traceback" not in stdout + stderr, stdout + stderr
    return process.returncode, stdout, stderr


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def recipients(server: Faulty) -> list[list[str]]:
    return [each.recipients for each in server.mails if each.content]


def run_patched(patch: str, out: Path, server: Faulty, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the program after this patch of it, beside the outbox."""
    words = [*patched(patch), *arguments]
    return subprocess.run(words, cwd=out.parent, env=to(server), capture_output=True, timeout=30)


# --------------------------------------------------------------------------------------------------- what is moved


@pytest.mark.parametrize("jobs", ["1", "4"])
def test_what_everybody_accepted_is_moved_and_the_next_run_has_nothing_to_do(
    jobs: str, run: Run, serve: Serve, out: Path
) -> None:
    server, files = serve(), letters(out, 12)
    before = content_of(out)
    done = run(*SEND, "--jobs", jobs, **to(server))
    assert (done.returncode, done.stderr, sorted(taken(server))) == (0, b"", names(files))
    assert (content_of(out), content_of(out.parent / "sent")) == ({}, before)
    done = run(*SEND, "--jobs", jobs, **to(server))
    assert (done.returncode, done.stderr, len(server.mails)) == (0, b"", 12)
    assert re.fullmatch(SUMMARY.format(0, 0) + "\n", done.stdout.decode())


def test_single_files_are_moved_too_into_a_folder_within_theirs(run: Run, serve: Serve, out: Path) -> None:
    server, (first, second, third) = serve(), letters(out, 3)
    (out / "sent").mkdir()
    done = run(first, "out/00003.eml", "--send_smtp", "--sent", out / "sent", **to(server))
    assert (done.returncode, taken(server)) == (0, ["00001", "00003"])
    assert sorted(content_of(out / "sent")) == [first.name, third.name]
    assert second.exists()


def test_an_older_message_of_the_same_name_is_not_lost(run: Run, serve: Serve, out: Path) -> None:
    letters(out, 1)
    (out.parent / "sent" / "00001.eml").write_bytes(b"older")
    assert run(*SEND, **to(serve())).returncode == 0
    kept = content_of(out.parent / "sent").values()
    assert len(kept) == 2
    assert b"older" in kept
    assert not content_of(out)


@pytest.mark.parametrize(
    ("stage", "answer", "code"),
    [("MAIL", LATER, 75), ("RCPT", LATER, 75), ("DATA", LATER, 75), ("dot", LATER, 75), ("dot", SPAM, 1)],
)
@pytest.mark.parametrize("jobs", ["1", "3"])
def test_every_seventh_that_is_refused_is_left_for_the_next_run(
    stage: str, answer: str, code: int, jobs: str, run: Run, serve: Serve, out: Path
) -> None:
    server = serve({stage: sometimes(answer, lambda number: number % 7 == 0)}, "PIPELINING")
    files = letters(out, 21)
    for left, expected in ((3, code), (0, 0)):
        assert run(*SEND, "--jobs", jobs, **to(server)).returncode == expected
        assert len(content_of(out)) == left
    assert sorted(set(taken(server))) == names(files)
    assert len(taken(server)) == 21 + 3 * (stage == "dot")  # which is written down before it is refused


@pytest.mark.parametrize("answer", [BUSY, LastWord(BUSY), Fault.DROP], ids=["421", "421 and closed", "dropped"])
def test_a_server_that_has_had_enough_gets_the_rest_in_the_next_run(
    answer: str | Fault, run: Run, serve: Serve, out: Path
) -> None:
    files, enough = letters(out, 10), True
    server: Faulty = serve({"MAIL": lambda _: answer if enough and len(server.mails) >= 6 else "250 2.1.0 ok"})
    assert run(*SEND, **to(server)).returncode == 75
    assert names(out.iterdir()) == names(files[6:])
    enough = False
    assert run(*SEND, **to(server)).returncode == 0
    assert taken(server) == names(files)


@pytest.mark.parametrize(
    "arguments",
    [["out", "--sent", "sent"], ["-", "--send_smtp", "--sent", "sent"], ["out", "--send_smtp", "--sent"]],
    ids=" ".join,
)
def test_sent_needs_files_a_way_and_a_folder(arguments: list[str], run: Run, out: Path) -> None:
    letters(out, 1)
    assert run(*arguments, SMTP_HOST="localhost", data=mail()).returncode == 2
    assert len(content_of(out)) == 1


@pytest.mark.parametrize("sent", ["absent", "out/00001.eml", "/dev/shm", "out", "./out"])
def test_a_folder_that_cannot_serve_is_told_before_anything_is_sent(
    sent: str, run: Run, serve: Serve, out: Path
) -> None:
    if sent == "/dev/shm" and os.stat(sent).st_dev == out.stat().st_dev:
        pytest.skip("needs a second file system")
    server = serve()
    letters(out, 2)
    before = content_of(out)
    done = run("out", "--send_smtp", "--sent", sent, **to(server))
    assert (done.returncode, server.lines, content_of(out)) == (1, [], before)
    assert re.fullmatch(rf"sparkpostSMIME\.py: .*{sent}.*\n", done.stderr.decode())


@pytest.mark.parametrize("other", [False, True], ids=["leads nowhere", "leads elsewhere"])
def test_a_symbolic_link_is_sent_once_and_moved(other: bool, run: Run, serve: Serve, out: Path) -> None:
    server, sent = serve(), out.parent / "sent"
    (out / "body").write_bytes(mail())
    (out / "a.eml").symlink_to("body")
    if other:
        (sent / "body").write_bytes(b"another file")
    for _ in range(2):
        assert run(*SEND, **to(server)).returncode == 0
    assert (len(server.mails), names(out.iterdir()), (sent / "a.eml").is_symlink()) == (1, ["body"], True)


def test_files_of_one_name_do_not_overwrite_each_other(start: Start, serve: Serve, out: Path) -> None:
    server, folders = serve({}, "PIPELINING"), [out / name for name in "abcdefgh"]
    files = sorted(
        (path for each in folders for path in letters(each, 40, X_From=each.name)), key=lambda path: path.name
    )
    before = {path.read_bytes() for path in files}
    code, _, stderr = ended(start(*files, *SEND[1:], "--jobs", "4", **to(server)))
    assert (code, stderr) == (0, "")
    assert set(content_of(out.parent / "sent").values()) == before
    assert len(server.mails) == len(before) == 320


@pytest.mark.parametrize("how", ["renamed", "written over"])
@pytest.mark.parametrize("answer", ["250 2.1.5 ok", LATER], ids=["everybody", "some"])
def test_a_message_that_takes_the_place_of_one_under_way_is_sent_too(
    answer: str, how: str, run: Run, serve: Serve, out: Path
) -> None:
    message, new = out / "a.eml", TO_THREE.replace(b"Hello", b"Later")
    message.write_bytes(TO_THREE)

    def replace(_: str) -> str:
        if len(server.mails) == 1:
            place = out / "b" if how == "renamed" else message
            place.write_bytes(new)
            place.rename(message)
        return "250 2.0.0 ok"

    server: Faulty = serve({"dot": replace, TO_BOB: answer})
    assert run(*SEND, **to(server)).returncode == (0 if answer.startswith("2") else 75)
    assert message.read_bytes() == new
    server.answers[TO_BOB] = "250 2.1.5 ok"
    assert run(*SEND, **to(server)).returncode == 0
    assert recipients(server)[-1] == [STEVET, BOB, CAROL]
    assert [b"Later" in each.content for each in server.mails] == [False, True]
    assert (content_of(out), content_of(out.parent / "sent")) == ({}, {"a.eml": new})


def test_a_message_that_is_replaced_again_and_again_is_never_moved_unsent(
    start: Start, run: Run, serve: Serve, out: Path
) -> None:
    server, message = serve({}, "PIPELINING"), out / "daily.eml"
    process = start(*[message] * 20_000, "--send_smtp", "--sent", "sent", "--quiet", **to(server))
    for number in count(1):
        (out / "new").write_bytes(mail(Subject=f"token-{number}"))
        (out / "new").rename(message)
        if process.poll() is not None:
            break
        time.sleep(0.001)
    assert run(*SEND, **to(server)).returncode == 0
    assert not content_of(out)
    moved = [token(content) for content in content_of(out.parent / "sent").values()]
    assert sorted(moved) == sorted(set(moved))
    assert set(moved) <= set(taken(server))
    assert len(taken(server)) == len(set(taken(server)))
    assert str(number) in moved
    assert len(moved) > 20


# --------------------------------------------------------------------------------------------- accepted by some only


@pytest.mark.parametrize("options", [[], ["--sign", "--encrypt"]], ids=["as it is", "encrypted"])
@pytest.mark.parametrize(("answer", "code"), [(LATER, 75), (SPAM, 1)], ids=["later", "never"])
def test_who_has_a_message_is_noted_and_gets_it_no_second_time(
    answer: str,
    code: int,
    options: list[str],
    run: Run,
    serve: Serve,
    out: Path,
    openssl: Openssl,
    authority: Authority,
) -> None:
    answers: dict[str, Answer] = {TO_BOB: answer}
    server, message, note = serve(answers), out / "a.eml", out / "a.eml.accepted"
    message.write_bytes(TO_THREE)
    groups = [[STEVET], [CAROL]] if options else [[STEVET, CAROL]]
    for _ in range(2):
        assert run(*SEND, *options, **to(server)).returncode == code
        assert recipients(server) == groups
        assert note.stat().st_mode & 0o777 == 0o600
        assert set(re.findall(r'[^"]+@[^"]+', json.dumps(json.loads(note.read_text())))) == {STEVET, CAROL}
        assert sorted(content_of(out)) == ["a.eml", "a.eml.accepted"]
    server.answers[TO_BOB] = "250 2.1.5 ok"
    assert run(*SEND, *options, **to(server)).returncode == 0
    assert recipients(server) == [*groups, [BOB]]
    assert (content_of(out), content_of(out.parent / "sent")) == ({}, {"a.eml": TO_THREE})
    if options:
        assert b"Hello" in openssl.verify(openssl.decrypt(inner(server.mails[-1].content), authority.identity(BOB)))


def test_what_is_noted_grows_from_run_to_run(run: Run, serve: Serve, out: Path) -> None:
    server = serve({TO_BOB: LATER, f"RCPT TO:<{CAROL}": LATER})
    (out / "a.eml").write_bytes(TO_THREE)
    for address, code in ((CAROL, 75), (BOB, 75), ("", 0)):
        assert run(*SEND, **to(server)).returncode == code
        server.answers[f"RCPT TO:<{address}"] = "250 2.1.5 ok"
    assert recipients(server) == [[STEVET], [CAROL], [BOB]]


@pytest.mark.parametrize("how", ["moved here", "written over"])
def test_a_note_tells_nothing_of_another_message_of_the_same_name(how: str, run: Run, serve: Serve, out: Path) -> None:
    server, message = serve({TO_BOB: LATER}), out / "a.eml"
    message.write_bytes(TO_THREE)
    assert run(*SEND, **to(server)).returncode == 75
    place = out / "b" if how == "moved here" else message
    place.write_bytes(TO_THREE.replace(b"Hello", b"Later"))
    place.rename(message)
    server.answers[TO_BOB] = "250 2.1.5 ok"
    assert run(*SEND, **to(server)).returncode == 0
    assert recipients(server) == [[STEVET, CAROL], [STEVET, BOB, CAROL]]
    assert not content_of(out)


@pytest.mark.parametrize("note", ["", "[", "[]", "null", '{"accepted": 5}', "{}", "\xff"], ids=ascii)
def test_a_damaged_note_loses_no_message(note: str, run: Run, serve: Serve, out: Path) -> None:
    (out / "a.eml.accepted").write_bytes(note.encode("latin-1"))
    (out / "a.eml").write_bytes(TO_THREE)
    (other,) = letters(out, 1)
    server = serve()
    done = run(*SEND, **to(server))
    assert not other.exists()
    if done.returncode == 0:
        assert recipients(server) == [[STEVET], [STEVET, BOB, CAROL]]
        assert not content_of(out)
    else:
        assert b"a.eml.accepted" in done.stderr
        assert (out / "a.eml").read_bytes() == TO_THREE


def twice_by_api(
    run: Run, answers: list[bytes | None], *options: str
) -> tuple[list[subprocess.CompletedProcess[bytes]], list[list[str]]]:
    """Two runs on the outbox, by an API that gives these answers in turn, and the recipients of each request."""
    with StandIn() as api:
        api.answers = answers
        variables = dict(SPARKPOST_API_KEY=API_KEY, SPARKPOST_HOST=api.url)
        done = [run("out", "--send_api", "--sent", "sent", *options, **variables) for _ in range(2)]
    return done, [request.recipients for request in api.requests]


@pytest.mark.parametrize(
    ("answers", "options", "codes", "groups"),
    [
        (
            [accepted(2), reply(503, {"errors": [{"message": "Told"}]}), accepted(1)],
            ["--encrypt"],
            [75, 0],
            [[STEVET, BOB], [CAROL], [CAROL]],
        ),
        ([reply(200, {"results": results(2, 1, ERROR)}), accepted(3)], [], [1], [[STEVET, BOB, CAROL]]),
    ],
    ids=["the second copy", "somebody, but the API does not say who"],
)
def test_who_has_a_message_from_the_api_gets_it_no_second_time(
    answers: list[bytes | None],
    options: list[str],
    codes: list[int],
    groups: list[list[str]],
    run: Run,
    out: Path,
) -> None:
    (out / "a.eml").write_bytes(TO_THREE)
    done, reached = twice_by_api(run, answers, *options)
    assert reached == groups
    assert [each.returncode for each in done][: len(codes)] == codes


@pytest.mark.parametrize("other", ["jim", "o'", "x."])
def test_an_address_within_a_refused_one_is_not_refused(other: str, run: Run, out: Path) -> None:
    (out / "a.eml").write_bytes(mail(To=f"{BOB}, {other}{BOB}, {CAROL}"))
    error = ERROR | {"description": f"<{other}{BOB}>"}
    done, reached = twice_by_api(run, [reply(200, {"results": results(1, 2, error, ERROR)}), accepted(3)])
    assert ([each.returncode for each in done], len(reached)) == ([1, 1], 1)
    assert b"did not say which" in done[1].stderr


@pytest.mark.parametrize("form", ["{}", "'{}'", "[{}]", "it is {}."])
def test_a_refused_address_is_found_in_what_the_api_says(form: str, run: Run, out: Path) -> None:
    (out / "a.eml").write_bytes(mail(To=f"{BOB}, {CAROL}"))
    error = ERROR | {"description": form.format(CAROL.upper())}
    done, reached = twice_by_api(run, [reply(200, {"results": results(1, 1, error)}), accepted(1)])
    assert ([each.returncode for each in done], reached) == ([1, 0], [[BOB, CAROL], [CAROL]])


def test_a_lock_on_the_folder_for_what_is_sent_is_told_and_costs_nothing(run: Run, serve: Serve, out: Path) -> None:
    server, sent = serve(), out.parent / "sent"
    letters(out, 1)
    folder = os.open(sent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # as flock(1) does for who runs the program under it
    done = run(*SEND, **to(server))
    os.close(folder)
    assert (done.returncode, list(sent.iterdir())) == (75, [])
    assert b"00001.eml: sent, but not moved to sent: another program holds a lock on it" in done.stderr
    done = run(*SEND, **to(server))
    assert (done.returncode, names(sent.iterdir()), len(server.mails)) == (0, ["00001"], 1)


def test_what_could_not_be_noted_is_no_failure_once_everybody_has_the_message(serve: Serve, out: Path) -> None:
    server = serve({"RCPT": sometimes("452 4.5.3 too many recipients", lambda number: number in (3, 7))})
    for name in "ab":
        (out / f"{name}.eml").write_bytes(TO_THREE)
    done = run_patched(FULL, out, server, *SEND)
    assert (done.returncode, done.stderr, content_of(out)) == (0, b"", {})
    assert recipients(server) == [[STEVET, BOB], [CAROL]] * 2


def test_who_has_a_message_but_could_not_be_noted_needs_a_look_and_nothing_more_is_sent(
    serve: Serve, out: Path
) -> None:
    server = serve({TO_BOB: LATER})
    for name in "ab":
        (out / f"{name}.eml").write_bytes(TO_THREE)
    done = run_patched(FULL, out, server, *SEND)
    assert (done.returncode, recipients(server)) == (1, [[STEVET, CAROL]])
    assert b"a.eml: who has it cannot be noted: No space left on device" in done.stderr
    assert b"the outbox cannot be written: the rest is not tried" in done.stdout + done.stderr
    assert sorted(content_of(out)) == ["a.eml", "b.eml"]


def test_memory_that_runs_out_within_a_message_ends_its_connection_and_no_other_message(
    serve: Serve, out: Path
) -> None:
    server = serve()
    letters(out, 3)
    done = run_patched(SHORT, out, server, *SEND, "--report", "report")
    assert (done.returncode, done.stderr.count(b"not enough memory; the message may have been sent")) == (1, 1)
    assert (len(content_of(out)), len(server.mails)) == (1, 2)
    lines = [json.loads(line) for line in (out.parent / "report").read_text().splitlines()]
    assert [line["attempts"] for line in lines] == [1, 1, 1]


def test_what_cannot_be_moved_keeps_who_had_it_before_too(run: Run, serve: Serve, out: Path) -> None:
    server = serve({TO_BOB: LATER})
    (out / "a.eml").write_bytes(TO_THREE)
    assert run(*SEND, **to(server)).returncode == 75
    server.answers[TO_BOB] = "250 2.1.5 ok"
    folder = os.open(out.parent / "sent", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # so that nothing can be moved there
    assert run(*SEND, **to(server)).returncode == 75
    os.close(folder)
    assert run(*SEND, **to(server)).returncode == 0
    assert (recipients(server), content_of(out)) == ([[STEVET, CAROL], [BOB]], {})


def test_a_note_is_on_the_disk_before_it_takes_the_place_of_the_last(serve: Serve, out: Path) -> None:
    (out / "a.eml").write_bytes(TO_THREE)
    watch = """
import os, stat
def told(name, call):
    def wrapper(*arguments):
        folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
        print(name, "folder" if folder else "note", file=sys.stderr, flush=True)
        return call(*arguments)
    return wrapper
os.fsync, os.replace = told("fsync", os.fsync), told("replace", os.replace)
"""
    done = run_patched(watch, out, serve({TO_BOB: LATER}), *SEND)
    assert done.returncode == 75
    assert done.stderr.startswith(b"fsync note\nreplace note\nfsync folder\n")


def test_a_note_that_fails_once_does_not_end_the_run(serve: Serve, out: Path) -> None:
    server = serve({f"RCPT TO:<{CAROL}": LATER})
    for name in "ab":
        (out / f"{name}.eml").write_bytes(mail(Bcc=f"{BOB}, {CAROL}"))
    once = """
sync, calls = program.os.fsync, []
def full_once(descriptor):
    calls.append(descriptor)
    if len(calls) == 1:
        raise OSError(28, "No space left on device")
    sync(descriptor)
program.os.fsync = full_once
"""
    done = run_patched(once, out, server, *SEND, "--encrypt")
    assert (done.returncode, recipients(server)) == (75, [[STEVET], [BOB]] * 2)
    assert b"not tried" not in done.stderr
    assert sorted(content_of(out)) == ["a.eml", "a.eml.accepted", "b.eml", "b.eml.accepted"]


@pytest.mark.parametrize("later", [True, False], ids=["the other is noted too", "the other is moved"])
def test_a_note_of_the_message_that_has_come_in_its_place_stays(later: bool, run: Run, serve: Serve, out: Path) -> None:
    path, codes = out / "a.eml", []
    path.write_bytes(TO_THREE)

    def replace(_: str) -> str:
        if len(server.mails) == 1:
            (out / "new").write_bytes(mail(b"Another\r\n", To=f"{STEVET}, {BOB}"))
            (out / "new").rename(path)
            server.answers[TO_BOB] = LATER if later else "250 2.1.5 ok"
            codes.append(run(*SEND, **to(server)).returncode)
        return "250 2.0.0 ok"

    server: Faulty = serve({"dot": replace, TO_BOB: LATER})
    run(*SEND, **to(server))
    assert codes == [75 if later else 0]
    server.answers[TO_BOB] = "250 2.1.5 ok"
    assert run(*SEND, **to(server)).returncode == 0
    others = [[STEVET], [BOB]] if later else [[STEVET, BOB]]
    assert recipients(server) == [[STEVET, CAROL], *others]
    assert content_of(out) == {}


def test_an_interrupt_while_a_note_is_written_leaves_nothing_behind(serve: Serve, out: Path) -> None:
    (out / "a.eml").write_bytes(TO_THREE)
    twice = "import os; program.os.fsync = lambda _: [os.kill(os.getpid(), 2) for _ in range(2)]"
    assert run_patched(twice, out, serve({TO_BOB: LATER}), *SEND).returncode == 75
    assert sorted(content_of(out)) == ["a.eml"]


def test_a_kill_while_a_note_is_written_leaves_nothing_behind_for_ever(run: Run, serve: Serve, out: Path) -> None:
    (out / "a.eml").write_bytes(TO_THREE)
    server = serve({TO_BOB: LATER})
    done = run_patched("import os; program.os.fsync = lambda _: os.kill(os.getpid(), 9)", out, server, *SEND)
    assert done.returncode == -9
    assert sorted(content_of(out)) == ["a.eml", "a.eml.noting"]
    server.answers[TO_BOB] = "250 2.1.5 ok"
    assert run(*SEND, **to(server)).returncode == 0
    assert content_of(out) == {}


def test_a_message_that_comes_right_after_the_move_keeps_its_note(run: Run, serve: Serve, out: Path) -> None:
    (out / "a.eml").write_bytes(mail(b"First\r\n"))
    (out.parent / "new").write_bytes(mail(b"Another\r\n", To=f"{STEVET}, {BOB}"))
    server = serve({TO_BOB: LATER})
    patch = f"""
import os, subprocess
rename = os.rename
def slow(source, target):
    rename(source, target)
    if source == "out/a.eml":
        rename("new", source)
        subprocess.run({[sys.executable, str(SCRIPT), *SEND]!r})
os.rename = slow
"""
    run_patched(patch, out, server, *SEND)
    assert recipients(server) == [[STEVET], [STEVET]]
    server.answers[TO_BOB] = "250 2.1.5 ok"
    assert run(*SEND, **to(server)).returncode == 0
    assert (recipients(server), content_of(out)) == ([[STEVET], [STEVET], [BOB]], {})


def test_too_many_recipients_are_no_partial_acceptance(run: Run, serve: Serve, out: Path) -> None:
    server = serve({"RCPT": sometimes("452 4.5.3 too many recipients", lambda number: number == 3)}, "PIPELINING")
    (out / "a.eml").write_bytes(TO_THREE)
    assert run(*SEND, **to(server)).returncode == 0
    assert recipients(server) == [[STEVET, BOB], [CAROL]]
    assert not content_of(out)


def test_a_name_that_leaves_no_room_for_a_note_is_told_and_the_others_go(run: Run, serve: Serve, out: Path) -> None:
    server, (first, _) = serve(), letters(out, 2)
    long = first.rename(out / ("n" * 245 + ".eml"))
    done = run(*SEND, **to(server))
    assert (done.returncode, taken(server), long.exists()) == (1, ["00002"], True)
    assert re.fullmatch(rf"sparkpostSMIME\.py: out/{long.name}.*: File name too long\n", done.stderr.decode())


def test_a_long_name_leaves_room_for_a_note_wherever_it_is_sent(run: Run, serve: Serve, out: Path) -> None:
    server, message = serve({TO_BOB: LATER}), out / ("n" * 242 + ".eml")
    message.write_bytes(TO_THREE)
    for _ in range(2):
        assert run(*SEND, **to(server)).returncode == 75
    assert recipients(server) == [[STEVET, CAROL]]


def test_what_is_no_file_is_told_in_words(run: Run, serve: Serve, out: Path) -> None:
    (message,) = letters(out, 1)
    os.mkfifo(out / "00000.eml")
    done = run(*SEND, **to(serve()))
    assert (done.returncode, message.exists()) == (1, False)
    assert re.fullmatch(rb"sparkpostSMIME\.py: out/00000\.eml: [^\n]*seek[^\n]*\n", done.stderr)


# ------------------------------------------------------------------------------------------------- runs that overlap


def test_a_message_that_another_run_has_is_left_to_it(run: Run, serve: Serve, out: Path) -> None:
    server, files = serve(), letters(out, 3)
    with files[1].open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run(*SEND, **to(server))
    assert (done.returncode, done.stderr, taken(server)) == (0, b"", ["00001", "00003"])
    assert re.search(SUMMARY.format(2, 2) + r", 1 under way elsewhere\n\Z", done.stdout.decode())
    assert sorted(content_of(out)) == ["00002.eml"]


def test_a_message_is_locked_while_it_is_sent_and_no_longer(run: Run, serve: Serve, out: Path) -> None:
    files = letters(out, 2)

    def locks(_: str) -> str:
        for path in out.iterdir():
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    locked.append(path.stem)
        return SPAM

    locked: list[str] = []
    assert run(*SEND, **to(serve({"MAIL": locks}))).returncode == 1
    assert locked == names(files)


def test_overlapping_runs_send_each_message_once(start: Start, serve: Serve, out: Path) -> None:
    server, files = serve({"dot": slow(0.01)}, "PIPELINING"), letters(out, 60)
    runs = [start(*SEND, "--jobs", jobs, **to(server)) for jobs in ("1", "2", "3")]
    sent = 0
    for process in runs:
        code, stdout, stderr = ended(process)
        assert (code, stderr) == (0, "")
        sent += int(re.findall(r"(?m)^Sent (\d+) of \1 messages", stdout)[0])
    assert (sent, sorted(taken(server)), names((out.parent / "sent").iterdir())) == (60, names(files), names(files))


@pytest.mark.parametrize(("place", "sent"), [("sent", True), ("elsewhere", True), ("sent", False)])
def test_a_message_that_vanishes_was_another_runs_where_that_has_moved_it(
    place: str, sent: bool, run: Run, serve: Serve, out: Path
) -> None:
    files, theirs = letters(out, 4), out.parent / place
    theirs.mkdir(exist_ok=True)

    def move(_: str) -> str:
        with suppress(FileNotFoundError):
            files[2].rename(theirs / files[2].name)
        return "250 2.1.0 ok"

    server, moved = serve({"MAIL": move}), sent and place == "sent"
    done = run(*SEND[: 4 if sent else 2], **to(server))
    assert taken(server) == ["00001", "00002", "00004"]
    end = "3, 1 under way elsewhere" if moved else "4, 1 refused"
    assert re.search(SUMMARY.format("3", end[0]) + end[1:] + "\n", done.stdout.decode())
    assert (done.returncode, b"00003.eml: No such file" in done.stderr) == ((0, False) if moved else (1, True))


@pytest.mark.parametrize("name", ["outt", "out/absent.eml", "out/*.eml"])
def test_a_mistyped_outbox_is_no_empty_one(name: str, run: Run, serve: Serve, out: Path) -> None:
    done = run(name, *SEND[1:], **to(serve()))
    assert (done.returncode, done.stderr) == (1, f"sparkpostSMIME.py: {name}: No such file or directory\n".encode())


def test_a_message_that_comes_in_the_place_of_another_before_it_is_read_is_sent_once(
    run: Run, serve: Serve, out: Path
) -> None:
    server, message, new = serve(), out / "a.eml", out.parent / "new"
    message.write_bytes(TO_THREE)
    new.write_bytes(TO_THREE.replace(b"Hello", b"Later"))
    late = """
import os
prepare = program.prepare
def replaced(*arguments):
    os.rename("new", "out/a.eml")
    return prepare(*arguments)
program.prepare = replaced
"""
    done = run_patched(late, out, server, *SEND)
    assert (done.returncode, server.mails) == (75, [])
    assert b"a.eml: another message has come in its place" in done.stderr
    assert run(*SEND, **to(server)).returncode == 0
    assert ([b"Later" in each.content for each in server.mails], content_of(out)) == ([True], {})


# -------------------------------------------------------------------------------------------- files and disks at fault


@pytest.mark.parametrize("sent", [True, False], ids=["outbox", "plain"])
def test_a_file_that_is_being_written_waits_until_it_is_whole(sent: bool, run: Run, serve: Serve, out: Path) -> None:
    server, (first, second) = serve(), letters(out, 2)
    whole = first.read_bytes() + b"The last line.\r\n"
    os.truncate(first, 100_000_000)  # which takes a while to read
    writing = f"file = open({str(first)!r}, 'ab', 0)\nwhile True: file.write(b'A line of text.\\r\\n')"
    with subprocess.Popen([sys.executable, "-c", writing]) as writer:
        size = first.stat().st_size
        wait_for(lambda: first.stat().st_size > size)
        done = run(*SEND[: 4 if sent else 2], **to(server))
        writer.kill()
    assert (done.returncode, taken(server)) == (75, ["00002"])
    assert b"00001.eml" in done.stderr
    assert second.exists() is not sent
    first.write_bytes(whole)
    assert run(*SEND, **to(server)).returncode == 0
    first_sent = next(each.content for each in server.mails if token(each.content) == "00001")
    assert first_sent.endswith(b"The last line.\r\n")


@pytest.mark.parametrize("shut", ["out", "sent"])
def test_folders_between_which_nothing_can_be_moved_are_told_before_anything_is_sent(
    shut: str, run: Run, serve: Serve, out: Path
) -> None:
    server, path, root = serve(), out.parent / shut, os.geteuid() == 0
    letters(out, 2)
    if root:  # who may write in any folder, but cannot rename from one mount to another, even of the same disk
        need("mount", "umount")
        subprocess.run(["mount", "--bind", path, path], check=True)
    else:
        path.chmod(0o555)
    done = run(*SEND, **to(server))
    if root:
        subprocess.run(["umount", path], check=True)
    path.chmod(0o755)
    assert (done.returncode, server.lines, len(content_of(out))) == (1, [], 2)
    assert shut.encode() in done.stderr


def test_a_read_only_disk_is_told_before_anything_is_sent(run: Run, serve: Serve, volume: Path) -> None:
    server = serve()
    letters(volume / "out", 2)
    subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
    done = run(volume / "out", "--send_smtp", "--sent", volume / "sent", **to(server))
    assert (done.returncode, server.lines, len(content_of(volume / "out"))) == (1, [], 2)
    assert str(volume / "sent").encode() in done.stderr


def test_what_is_sent_but_cannot_be_moved_is_not_sent_again(run: Run, serve: Serve, out: Path) -> None:
    files, sent, elsewhere = letters(out, 6), out.parent / "sent", out.parent / "elsewhere"
    server: Faulty = serve({"dot": lambda _: lose() if len(server.mails) == 3 else "250 2.0.0 ok"})

    def lose() -> str:
        sent.rename(elsewhere)
        return "250 2.0.0 ok"

    done = run(*SEND, **to(server))
    assert (done.returncode, len(done.stderr.splitlines())) == (75, 4)
    assert b"00003.eml: sent, but not moved to sent: No such file" in done.stderr
    assert re.search(SUMMARY.format(2, 6) + ", 4 to try again", done.stdout.decode())
    elsewhere.rename(sent)
    done = run(*SEND, **to(server))
    assert (done.returncode, done.stderr, content_of(out)) == (0, b"", {})
    assert taken(server) == names(files) == names(sent.iterdir())


def test_a_full_disk_loses_nothing(run: Run, serve: Serve, volume: Path) -> None:
    server = serve({TO_BOB: LATER})
    (volume / "out" / "a.eml").write_bytes(TO_THREE)
    with suppress(OSError), (volume / "filler").open("wb", 0) as filler:
        while True:
            filler.write(bytes(4096))
    arguments = (volume / "out", "--send_smtp", "--sent", volume / "sent")
    done = run(*arguments, **to(server))
    assert done.returncode in (1, 75)
    assert b"No space left on device" in done.stderr
    assert (volume / "out" / "a.eml").read_bytes() == TO_THREE
    (volume / "filler").unlink()
    server.answers[TO_BOB] = "250 2.1.5 ok"
    assert run(*arguments, **to(server)).returncode == 0
    assert BOB in recipients(server)[-1]
    assert (content_of(volume / "out"), list(content_of(volume / "sent"))) == ({}, ["a.eml"])


def test_a_folder_that_cannot_be_locked_as_on_nfs_is_used_all_the_same(serve: Serve, out: Path) -> None:
    server, files = serve(), letters(out, 2)
    nfs = """
import fcntl
flock = fcntl.flock
def without_folders(file, operation):
    if isinstance(file, int):
        raise OSError(9, "Bad file descriptor")
    flock(file, operation)
fcntl.flock = without_folders
"""
    done = run_patched(nfs, out, server, *SEND)
    assert (done.returncode, done.stderr, taken(server)) == (0, b"", names(files))
    assert names((out.parent / "sent").iterdir()) == names(files)


def test_a_file_that_is_written_over_while_it_is_read_waits_though_it_has_its_size(serve: Serve, out: Path) -> None:
    server, _ = serve(), letters(out, 1)
    touch = """
import itertools, os
fstat, numbers = os.fstat, itertools.count(1)
def touched(descriptor):
    os.utime("out/00001.eml", ns=(next(numbers),) * 2)
    return fstat(descriptor)
os.fstat = touched
"""
    done = run_patched(touch, out, server, *SEND[:2])
    assert (done.returncode, server.mails) == (75, [])
    assert b"00001.eml: this file is being written" in done.stderr


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("whole_group", [False, True], ids=["the parent", "as a terminal does"])
@pytest.mark.parametrize("jobs", ["1", "4"])
def test_a_signal_lets_what_is_under_way_end_and_leaves_the_rest(
    jobs: str, whole_group: bool, number: signal.Signals, start: Start, run: Run, serve: Serve, out: Path
) -> None:
    server, files = serve({"dot": slow(0.1)}, "PIPELINING"), letters(out, 60)
    process = start(*SEND, "--jobs", jobs, **to(server))
    wait_for(lambda: len(server.mails) > 4)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    most = len(server.mails) + int(jobs) + 1
    code, stdout, stderr = ended(process)
    sent = names((out.parent / "sent").iterdir())
    assert (code, stderr, sorted(taken(server))) == (75, "", sent)
    assert len(sent) <= most
    assert re.search(SUMMARY.format(len(sent), 60) + f", {60 - len(sent)} to try again\n\\Z", stdout)
    assert len(re.findall("(?m)^OK - in", stdout)) == len(sent)
    server.answers["dot"] = "250 2.0.0 queued"
    assert run(*SEND, "--jobs", jobs, **to(server)).returncode == 0
    assert sorted(taken(server)) == names(files)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize(("sent", "count", "jobs"), [(False, 1, "1"), (False, 1, "4"), (True, 3, "1"), (False, 3, "2")])
def test_a_single_message_stops_at_once_and_many_at_the_second_signal(
    sent: bool, count: int, jobs: str, number: signal.Signals, start: Start, serve: Serve, out: Path
) -> None:
    server, files = serve({"dot": Fault.SILENCE}), letters(out, count)
    process = start(*SEND[: 4 if sent else 2], "--jobs", jobs, **to(server))
    wait_for(lambda: len(server.mails) == min(count, int(jobs)))
    os.killpg(process.pid, number)
    if count > 1:
        time.sleep(0.3)
        assert process.poll() is None
        os.killpg(process.pid, number)
    began = time.monotonic()
    code, _, stderr = ended(process)
    assert time.monotonic() - began < 5
    assert code in (1, 75)
    assert "interrupted; a message under way may have been sent" in stderr
    assert names(out.iterdir()) == names(files)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_two_signals_end_a_run_whose_output_nobody_reads(jobs: str, start: Start, serve: Serve, out: Path) -> None:
    server = serve({}, "PIPELINING")
    letters(out, 400, Cc=f'"{"Bob " * 200}" <{BOB}>')
    process, before = start(*SEND, "--jobs", jobs, **to(server)), -1
    while len(server.mails) > before:  # until the pipe is full
        before = len(server.mails)
        time.sleep(1)
    for _ in range(2):
        process.terminate()
        time.sleep(0.2)
    assert process.wait(10) == 75
    assert 0 < before < 400


def test_a_signal_is_heeded_while_nobody_reads_the_output(serve: Serve, out: Path) -> None:
    letters(out, 400)
    server = serve({"dot": slow(0.01)}, "PIPELINING")
    words: list[str | Path] = [sys.executable, SCRIPT, *SEND, "--jobs", "2"]
    with subprocess.Popen(words, cwd=out.parent, env=to(server), stdout=subprocess.PIPE) as process:
        assert process.stdout
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        wait_for(lambda: len(server.mails) > 80)  # of which the output cannot tell
        process.terminate()
        time.sleep(1)
        before = len(server.mails)
        time.sleep(0.5)
        assert len(server.mails) == before < 400
        assert process.stdout.read().count(b"OK - in") == before
    assert process.returncode == 75
    assert len(content_of(out)) == 400 - before


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_any_number_of_signals_ends_in_order(jobs: str, start: Start, serve: Serve, out: Path) -> None:
    letters(out, 3)
    for _ in range(5):
        server = serve({"dot": Fault.SILENCE})
        process = start(*SEND, "--jobs", jobs, **to(server))
        wait_for(lambda: len(server.mails) == int(jobs))  # noqa: B023
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        code, _, _ = ended(process)
        assert code == 75
    assert len(content_of(out)) == 3


def test_a_signal_after_the_last_answer_does_not_undo_it(start: Start, serve: Serve, out: Path) -> None:
    server, (message,) = serve({"QUIT": Fault.SILENCE}), letters(out, 1)
    process = start(message, "--send_smtp", **to(server))
    wait_for(lambda: any(line.upper().startswith(b"QUIT") for _, line in server.lines))
    process.terminate()
    code, stdout, stderr = ended(process)
    assert (code, stderr, "\nOK - in" in stdout) == (0, "", True)


@pytest.mark.parametrize("jobs", ["2", "4"])
def test_workers_end_when_the_parent_is_killed(jobs: str, start: Start, run: Run, serve: Serve, out: Path) -> None:
    server, files = serve({"dot": slow(0.1)}, "PIPELINING"), letters(out, 40)
    process = start(*SEND, "--jobs", jobs, **to(server))
    wait_for(lambda: len(server.mails) > 4)
    process.kill()
    code, _, _ = ended(process)
    assert code == -signal.SIGKILL
    assert 4 < len(server.mails) < 20
    server.answers["dot"] = "250 2.0.0 queued"
    assert run(*SEND, "--jobs", jobs, **to(server)).returncode == 0
    assert set(taken(server)) == set(names(files))
    assert len(server.mails) <= 40 + int(jobs)


def test_a_worker_that_is_killed_costs_its_message_and_no_other(start: Start, serve: Serve, out: Path) -> None:
    server, files = serve({"dot": slow(0.05)}, "PIPELINING"), letters(out, 30)
    process = start(*SEND, "--jobs", "3", **to(server))
    wait_for(lambda: len(server.mails) > 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    code, stdout, stderr = ended(process)
    (left,) = out.iterdir()
    assert code == 75
    assert re.fullmatch(rf"sparkpostSMIME\.py: out/{left.name}: its .*may have been sent.*\n", stderr)
    assert re.search(SUMMARY.format(29, 30) + ", 1 to try again", stdout)
    assert sorted({*taken(server), left.stem}) == names(files)


def test_when_all_workers_are_killed_the_rest_waits_for_the_next_run(start: Start, serve: Serve, out: Path) -> None:
    server, files = serve({"dot": slow(0.05)}, "PIPELINING"), letters(out, 30)
    process = start(*SEND, "--jobs", "2", **to(server))
    wait_for(lambda: len(server.mails) > 4)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    code, stdout, stderr = ended(process)
    left = names(out.iterdir())
    assert code == 75
    assert stderr.count("its process was killed; the message may have been sent") == len(stderr.splitlines()) - 1 <= 2
    assert stderr.count("no process is left: the rest is not tried") == 1
    assert re.search(SUMMARY.format(30 - len(left), 30) + f", {len(left)} to try again", stdout)
    assert {*taken(server), *left} == set(names(files))


def test_a_worker_that_is_killed_before_it_begins_keeps_no_message_back(serve: Serve, out: Path) -> None:
    server, files = serve(), letters(out, 12)
    done = run_patched(DOOMED, out, server, *SEND, "--jobs", "3")
    assert b"Traceback" not in done.stderr
    left = names(out.iterdir())
    assert (done.returncode, sorted([*taken(server), *left])) == (75 if left else 0, names(files))
    assert len(left) == len(done.stderr.splitlines()) <= 1


# ------------------------------------------------------------------------------------------------------------ kill -9


def kill_and_run_again(
    start: Start, run: Run, out: Path, jobs: int, kills: int, arguments: Iterable[str], variables: dict[str, str]
) -> int:
    """Kill the program at random moments while it sends an outbox, and let it end at last; how often it was killed."""
    total, sent, chance, killed = len(content_of(out)), out.parent / "sent", random.Random(), 0
    words = [*SEND, "--sign", "--quiet", "--jobs", str(jobs), *arguments]
    for number in range(kills):
        process = start(*words, **variables)
        goal = int((number + chance.random()) / kills * total * 0.9)
        wait_for(lambda: len(os.listdir(sent)) >= goal or process.poll() is not None, 300)  # noqa: B023
        time.sleep(chance.random() * 0.02)
        killed += process.poll() is None
        (os.killpg if chance.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
    for process in [start(*words, **variables) for _ in range(2)]:  # two that overlap, for the last
        assert ended(process)[0] == 0
    assert run(*words, **variables).returncode == 0  # what workers whose parent was killed had under way
    assert not content_of(out)
    assert len(content_of(sent)) == total
    return killed


def check(delivered: list[bytes], expected: list[str], repeats: int, openssl: Openssl) -> None:
    """Every message came, none in part, few twice, and they verify."""
    assert sorted({token(message) for message in delivered}) == expected
    assert len(delivered) - len(expected) <= repeats
    for message in delivered:
        boundary = re.search(rb'boundary="([^"]+)"', message)
        assert boundary
        assert message.rstrip().endswith(b"--" + boundary[1] + b"--")
    for message in random.sample(delivered, 20):
        assert openssl.verify(inner(message)).endswith(f"Letter {int(token(message))}\r\n".encode() * 20)


@pytest.mark.parametrize(
    ("count", "jobs", "kills", "wait"),
    [
        (100, 1, 6, 0.002),
        (300, 4, 15, 0.02),
        *([(10_000, 2, 20, 0)] if "SLOW" in os.environ else []),  # half a minute; not in CI
    ],
)
def test_an_outbox_survives_kills_at_random_moments(
    count: int,
    jobs: int,
    kills: int,
    wait: float,
    start: Start,
    run: Run,
    serve: Serve,
    out: Path,
    openssl: Openssl,
    authority: Authority,
) -> None:
    authority.identity(STEVE, "P-256").write(out.parent, private=True)
    server, files = serve({"dot": slow(wait)}, "PIPELINING"), letters(out, count)
    killed = kill_and_run_again(start, run, out, jobs, kills, [], to(server))
    assert killed > kills // 2
    check([each.content for each in server.mails], names(files), jobs * killed, openssl)


@pytest.fixture(scope="module")
def postfix() -> Iterator[Postfix]:
    need("postfix", "opendkim", "opendkim-genkey", "saslpasswd2", root=True)
    server = Postfix(Path("no.crt"), Path("no.key"))  # no TLS here
    yield server
    server.stop()


def test_an_outbox_into_postfix_survives_kills_at_random_moments(
    start: Start, run: Run, postfix: Postfix, out: Path, openssl: Openssl, authority: Authority
) -> None:
    authority.identity(STEVE, "P-256").write(out.parent, private=True)
    files = letters(out, 500)
    killed = kill_and_run_again(
        start, run, out, 2, 20, [], dict(SMTP_HOST="localhost", SMTP_PORT=str(postfix.seven_bit))
    )
    assert killed > 10
    queues = [postfix.folder / "queue" / name for name in ("maildrop", "incoming", "active", "deferred")]
    wait_for(lambda: not any(path.is_file() for queue in queues for path in queue.rglob("*")), 60)
    new = [path.read_bytes() for path in (postfix.maildir / "new").iterdir()]
    check([message.replace(b"\n", b"\r\n") for message in new], names(files), 2 * killed, openssl)
