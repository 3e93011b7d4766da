"""Scaling out as the README shows it: GNU parallel over ssh, supervisor, and Postfix's pipe(8), each for real."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import smtplib
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import BOB, CAROL, SCRIPT, STEVE, STEVET, mail, need
from faulty import Mailbox, Serve, start_faulty  # noqa: F401 (a fixture, used by name)
from pki import Authority
from readers import Openssl, command
from servers import Postfix, free_port, listening, wait_for
from test_postfix import dkim_verifies, wire
from test_readers import inner
from test_readme import README

HOST = "mail2.thetucks.com"
WARNING = b"parallel: Warning: Using -X or -m with --sshlogin may fail.\n"
MANY = [f"m{number:02}" for number in range(30)]
NAMES = ["a b", "it's", "ü", *MANY[:9]]
Control = Callable[..., str]
Shell = Callable[[str], "subprocess.CompletedProcess[bytes]"]


def shown(word: str) -> str:
    """The block of commands or settings in the README's section that has this word."""
    section = README.split("\n## Scaling out\n")[1].split("\n## ")[0]
    blocks = re.findall(r"(?m)(?:^    .*\n)+", section)
    (found,) = [textwrap.dedent(block) for block in blocks if word in block]
    return found


def settings(folder: Path, port: int, owner: str = "root") -> None:
    """Write my_envs.sh: what the README shows, with this port."""
    path = folder / "my_envs.new"
    path.touch(mode=0o600)
    path.write_text(shown("export SMTP_HOST").replace("10026", str(port)))
    shutil.chown(path, owner)
    path.rename(folder / "my_envs.sh")


def numbers(messages: list[bytes]) -> Counter[int]:
    """How often each message of an outbox arrived."""
    return Counter(int(re.search(rb"(?m)^Subject: (\d+)", message)[1]) for message in messages)  # type: ignore[index]


def opened(message: bytes, address: str, authority: Authority, openssl: Openssl) -> bytes:
    return openssl.verify(openssl.decrypt(inner(message), authority.identity(address)))


@pytest.fixture
def mailing(folder: Path) -> Path:
    """What the README has in /srv/mailing."""
    for name in ("outbox", "sent"):
        (folder / name).mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / SCRIPT.name).symlink_to(SCRIPT)
    return folder


def fill(mailing: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = mailing / "outbox" / f"{name}.eml"
        path.with_suffix(".tmp").write_bytes(mail(Subject=str(number), Message_ID=f"<{number}@thetucks.com>"))
        path.with_suffix(".tmp").rename(path)


def left(mailing: Path) -> int:
    return len(list((mailing / "outbox").iterdir()))


# ------------------------------------------------------------------------------------------- parallel, over ssh


@pytest.fixture
def shell(mailing: Path) -> Iterator[Shell]:
    """Run a block of the README in a shell for which the second machine is an sshd of the test's own."""
    need("parallel", "ssh", "ssh-keygen", "/usr/sbin/sshd", root=True)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd drops its privileges
    ssh, port = mailing / "ssh", free_port()
    ssh.mkdir(mode=0o700)
    for name in ("host", "user"):
        command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / name)
    (ssh / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {ssh}/host\nAuthorizedKeysFile {ssh}/user.pub\nPidFile none\n"
        "UsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    (ssh / "known_hosts").write_text(f"{HOST} {(ssh / 'host.pub').read_text()}")
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-E", ssh / "log", "-f", ssh / "sshd_config"])
    client = f"ssh -F none -i {ssh}/user -oHostName=127.0.0.1 -oPort={port} -oHostKeyAlias={HOST} -oBatchMode=yes"
    client += f" -oUserKnownHostsFile={ssh}/known_hosts"
    environment = {"PATH": os.environ["PATH"], "HOME": str(mailing), "PARALLEL_SSH": client}

    def shell(text: str) -> subprocess.CompletedProcess[bytes]:
        words = ["sh", "-c", text.replace("/srv/mailing", str(mailing))]
        return subprocess.run(words, cwd=mailing, env=environment, capture_output=True, timeout=60)

    try:
        wait_for(lambda: listening(port))
        yield shell
    finally:
        server.terminate()
        server.wait()


def joblog(mailing: Path) -> list[list[str]]:
    """Where each command of parallel's ran, and how it ended."""
    return [line.split("\t")[1:7:5] for line in (mailing / "joblog").read_text().splitlines()[1:]]


def test_parallel_shares_out_an_outbox(
    mailing: Path, shell: Shell, serve: Serve, openssl: Openssl, authority: Authority
) -> None:
    server = serve()
    settings(mailing, server.port)
    fill(mailing, NAMES)
    done = shell(shown("find outbox"))
    assert (done.returncode, done.stderr) == (0, WARNING), done
    assert numbers([message.content for message in server.mails]) == dict.fromkeys(range(12), 1)
    for message in server.mails:
        opened(message.content, STEVET, authority, openssl)
    assert (left(mailing), len(list((mailing / "sent").iterdir()))) == (0, 12)
    assert sorted(joblog(mailing)) == [[":", "0"], [HOST, "0"]]


def test_parallel_runs_again_what_its_joblog_says_has_failed(mailing: Path, shell: Shell, serve: Serve) -> None:
    replies = ["451 4.7.1 later"]
    server = serve({"RCPT": lambda line: replies[-1]})
    settings(mailing, server.port)
    fill(mailing, NAMES)
    assert shell(shown("find outbox")).returncode == 2  # so many commands have failed
    assert [code for _, code in joblog(mailing)] == ["75", "75"]
    assert server.heard.count(b"RCPT TO") == 3 * 12
    assert (left(mailing), server.mails) == (12, [])
    replies.append("250 ok")
    done = shell(shown("--retry-failed"))
    assert (done.returncode, done.stderr) == (0, b""), done
    assert [code for _, code in joblog(mailing)] == ["75", "75", "0", "0"]
    assert numbers([message.content for message in server.mails]) == dict.fromkeys(range(12), 1)
    assert left(mailing) == 0


# --------------------------------------------------------------------------------------------------- supervisor


class Slow(Mailbox):
    """Takes a tenth of a second for each message, and knows its clients."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: set[Any] = set()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.clients.add(session.peer)
        await asyncio.sleep(0.1)
        return await super().handle_DATA(server, session, envelope)


@pytest.fixture
def slow() -> Iterator[Slow]:
    server = Slow()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def control(mailing: Path, slow: Slow) -> Iterator[Control]:
    """supervisorctl, of a supervisord that has the README's program and looks into the outbox more often."""
    need("supervisord", "supervisorctl", root=True)
    settings(mailing, slow.port)
    own, program = mailing / "supervisord.conf", shown("[program:mailing]").replace("/srv/mailing", str(mailing))
    program = program.replace("user = mailing", "user = root").replace("sleep 5", "sleep 0.3")
    with tempfile.TemporaryDirectory() as short:  # as the name of a socket must be
        own.write_text(
            f"[supervisord]\nnodaemon = true\nuser = root\nlogfile = {mailing}/log\npidfile = {mailing}/pid\n"
            f"childlogdir = {mailing}\n[unix_http_server]\nfile = {short}/socket\n[supervisorctl]\n"
            f"serverurl = unix://{short}/socket\n[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n" + program
        )
        daemon = subprocess.Popen(["supervisord", "-c", own], stdout=subprocess.DEVNULL)

        def control(*words: str) -> str:
            words = ("supervisorctl", "-c", str(own), *words)
            return subprocess.run(words, capture_output=True, timeout=60, text=True).stdout

        try:
            wait_for(lambda: control("status").count("RUNNING") == 2)
            yield control
        finally:
            daemon.terminate()
            daemon.wait()


def received(slow: Slow) -> Counter[int]:
    return numbers([envelope.content for envelope in slow.mails])


def test_supervisor_keeps_two_processes_sending(mailing: Path, slow: Slow, control: Control) -> None:
    """Both send, each message once; one that is killed comes back, and what it had under way can come twice."""
    fill(mailing, MANY)
    wait_for(lambda: not left(mailing))
    assert received(slow) == dict.fromkeys(range(30), 1)
    assert len(slow.clients) >= 2
    slow.mails.clear()
    fill(mailing, MANY)
    wait_for(lambda: len(slow.mails) >= 5)
    wait_for(lambda: "signalled" in control("signal", "KILL", "mailing:mailing_0"))
    wait_for(lambda: not left(mailing))
    assert received(slow).keys() == set(range(30))
    assert received(slow).total() <= 31
    assert "mailing_0 (terminated by SIGKILL; not expected)" in (mailing / "log").read_text()
    wait_for(lambda: control("status").count("RUNNING") == 2)


def test_supervisor_stops_them_in_order(mailing: Path, slow: Slow, control: Control) -> None:
    """What is under way is finished, and all is where it belongs; after a new start, each message was sent once."""
    fill(mailing, MANY)
    wait_for(lambda: len(slow.mails) >= 5)
    control("stop", "mailing:*")
    assert control("status").count("STOPPED") == 2
    assert "SIGKILL" not in (mailing / "log").read_text()
    sent = len(list((mailing / "sent").iterdir()))
    assert (len(slow.mails), left(mailing)) == (sent, 30 - sent)
    assert 5 <= sent < 30
    control("start", "mailing:*")
    wait_for(lambda: not left(mailing))
    assert received(slow) == dict.fromkeys(range(30), 1)


# ------------------------------------------------------------------------------------------- Postfix as a filter


def public_python(folder: Path) -> None:
    """Make folder/.venv/bin/python, which every user can run; the one that runs the tests may be in root's home."""
    library = Path(sysconfig.get_path("stdlib"))
    ignore = shutil.ignore_patterns("site-packages", "dist-packages", "test", "idlelib", "config-*", "*.opt-*.pyc")
    shutil.copytree(library, folder / "lib" / library.name, ignore=ignore)
    packages = Path(sysconfig.get_path("platlib"))
    for name in ("cryptography", "cffi", "dotenv"):
        shutil.copytree(packages / name, folder / "lib" / name)
    libraries = Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*")
    for file in (*packages.glob("_cffi_backend*"), *libraries):
        shutil.copy(file, folder / "lib")
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(sys.executable, folder / "python")
    python = folder / ".venv" / "bin" / "python"
    variables = f"PYTHONHOME={folder} PYTHONPATH={folder}/lib LD_LIBRARY_PATH={folder}/lib"
    python.write_text(f'#!/bin/sh\n{variables} exec {folder}/python "$@"\n')
    command("chmod", "-R", "a+rX", folder)
    python.chmod(0o755)


class Filter(Postfix):
    """Postfix with the README's filter behind the port `filtered`, which sends to `back`.

    Behind `shared` is the same without the limit of one recipient, and with soft_bounce.
    """

    def _configure(self, certificate: Path, key: Path) -> None:
        super()._configure(certificate, key)
        self.filtered, self.shared, self.back = free_port(), free_port(), free_port()
        self.home = self.folder / "smime"
        self.home.mkdir()
        public_python(self.home)
        shutil.copy(SCRIPT, self.home)
        with (self.etc / "main.cf").open("a") as main:
            main.write(shown("smime_destination_recipient_limit"))
        services = shown("flags=q").replace("/srv/smime", str(self.home)).replace("user=smime", "user=nobody")
        services = services.replace("10026", str(self.back))
        shared = services[: services.index(f"127.0.0.1:{self.back}")].replace("10025", str(self.shared))
        shared = shared.replace("=smime:", "=shared:all").replace("smime unix", "shared unix")
        with (self.etc / "master.cf").open("a") as master:
            master.write(services.replace("10025", str(self.filtered)))
            master.write(shared.replace(" pipe", " pipe -o soft_bounce=yes"))
            master.write("pickup unix n - n 60 1 pickup\n")  # without which postqueue does nothing

    def logged(self, text: str) -> int:
        return len(re.findall(text, (self.folder / "log").read_text()))

    def queued(self, *queues: str) -> bool:
        return any(path.is_file() for queue in queues for path in (self.folder / "queue" / queue).rglob("*"))

    def wait_until_empty(self) -> None:
        wait_for(lambda: not self.queued("incoming", "active", "deferred"))

    def retry(self) -> None:
        """Once a message waits to be tried again, have that done now."""
        wait_for(lambda: self.queued("deferred"))
        time.sleep(0.2)  # its delivery is still being closed
        command("postqueue", "-c", self.etc, "-f")


@pytest.fixture(scope="module")
def postfix(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Filter]:
    need("postfix", "opendkim", "opendkim-genkey", "saslpasswd2", root=True)
    folder = tmp_path_factory.mktemp("tls")
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(folder / "pem")
    server = Filter(folder / "pem", folder / "pem")
    for address in (STEVE, STEVET, BOB, CAROL):
        authority.identity(address).write(server.home, private=address == STEVE)
    shutil.chown(server.home / f"{STEVE}.pem", "nobody")
    yield server
    server.stop()


def submit(port: int, sender: str, recipients: list[str], message: bytes) -> None:
    with smtplib.SMTP("127.0.0.1", port) as session:
        session.sendmail(sender, recipients, message)


def field(name: str, message: bytes) -> str:
    return re.search(rf"(?m)^{name}: (.*)$".encode(), message)[1].decode()  # type: ignore[index]


@pytest.mark.parametrize(("service", "sender"), [("smime", STEVE), ("smime", ""), ("shared", STEVE)])
def test_filter_signs_and_encrypts_for_every_recipient(
    service: str, sender: str, postfix: Filter, authority: Authority, openssl: Openssl
) -> None:
    settings(postfix.home, postfix.back, "nobody")
    before = postfix.logged(f"relay={service}, ")
    port = postfix.shared if service == "shared" else postfix.filtered
    submit(port, sender, [STEVET, BOB, CAROL], mail(To=STEVET, Cc=BOB))
    copies = {field("Delivered-To", message): message for message in postfix.take(3)}
    for address in (STEVET, BOB, CAROL):
        message = copies[address]
        assert field("Return-Path", message) == f"<{sender}>"
        assert dkim_verifies(wire(message), postfix)
        assert opened(message, address, authority, openssl).endswith(b"\r\nHello Steve\r\n")
        if address != CAROL:  # who is in no field: the others' copies do not know her
            with pytest.raises(AssertionError):
                openssl.decrypt(inner(message), authority.identity(CAROL))
    assert (inner(copies[STEVET]) == inner(copies[BOB])) == (service == "shared")
    postfix.wait_until_empty()
    assert postfix.logged(f"relay={service}, .*status=sent") - before == 3  # and not once more on the way back


def test_filter_leaves_in_the_queue_what_fails_for_now(postfix: Filter, authority: Authority, openssl: Openssl) -> None:
    settings(postfix.home, free_port(), "nobody")
    submit(postfix.filtered, STEVE, [BOB], mail(To=BOB))
    wait_for(lambda: postfix.logged(rf"to=<{BOB}>, relay=smime, .*status=deferred"))
    settings(postfix.home, postfix.back, "nobody")
    postfix.retry()
    (message,) = postfix.take()
    assert field("Delivered-To", message) == BOB
    opened(message, BOB, authority, openssl)
    postfix.wait_until_empty()


def test_filter_returns_what_fails_for_good(postfix: Filter, authority: Authority, openssl: Openssl) -> None:
    """One recipient has no certificate; nobody gets anything unprotected, and a failure's failure ends."""
    settings(postfix.home, postfix.back, "nobody")
    submit(postfix.filtered, STEVE, ["erin@thetucks.com", BOB], mail(To=f"erin@thetucks.com, {BOB}"))
    arrived = {field("Delivered-To", message): message for message in postfix.take(2)}
    assert arrived.keys() == {STEVE, BOB}
    opened(arrived[BOB], BOB, authority, openssl)
    assert field("Return-Path", arrived[STEVE]) == "<>"
    assert b"erin@thetucks.com.crt" in arrived[STEVE]  # which the script said
    assert b"\nHello Steve\n" in arrived[STEVE]
    submit(postfix.filtered, "", ["erin@thetucks.com"], mail(To="erin@thetucks.com"))
    wait_for(lambda: postfix.logged("relay=smime, .*status=bounced") == 2)
    postfix.wait_until_empty()
    assert postfix.take(0) == []


def test_filter_with_soft_bounce_keeps_what_fails(postfix: Filter, authority: Authority, openssl: Openssl) -> None:
    settings(postfix.home, postfix.back, "nobody")
    submit(postfix.shared, STEVE, ["frank@thetucks.com"], mail(To="frank@thetucks.com"))
    wait_for(lambda: postfix.logged("to=<frank@thetucks.com>, relay=shared, .*status=SOFTBOUNCE"))
    authority.identity("frank@thetucks.com").write(postfix.home)
    postfix.retry()
    (message,) = postfix.take()
    opened(message, "frank@thetucks.com", authority, openssl)
