"""Real servers on loopback for the tests: each starts on free ports and stops by the process ids it started."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

GIVEN: set[int] = set()


def free_port() -> int:
    """A port that can be bound now, below those that the kernel gives to whoever asks for any, and given out once."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            if port not in GIVEN:
                GIVEN.add(port)
                return port


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until the condition holds; raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.02)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Postfix:
    """Postfix with OpenDKIM, delivering every recipient to one maildir.

    Ports: `plain` relays anything; `relay` passes all on through a next hop without 8BITMIME; `submission` wants
    STARTTLS and a login, as SparkPost does; `strict` relays nothing for strangers (550).
    """

    user, password, realm = "SMTP_Injection", "correct-horse-battery-staple", "tests.example"
    selector = "test"

    def __init__(self, certificate: Path, key: Path) -> None:
        self.folder = folder = Path(tempfile.mkdtemp(prefix="postfix-"))
        folder.chmod(0o755)  # Postfix runs as several users
        self.plain, self.relay, self.seven_bit, self.submission, self.strict, self.milter = (
            free_port() for _ in range(6)
        )
        self.maildir = folder / "mail" / "box"
        self.mails: set[Path] = set()
        self._start_dkim()
        self._configure(certificate, key)
        try:
            subprocess.run(["postfix", "-c", self.etc, "start"], check=True, capture_output=True)
            for port in (self.plain, self.relay, self.submission, self.strict):
                wait_for(lambda port=port: listening(port))
        except BaseException:
            self.stop()
            raise

    def _start_dkim(self) -> None:
        dkim = self.folder / "dkim"
        dkim.mkdir()
        subprocess.run(
            ["opendkim-genkey", "-D", dkim, "-d", "thetucks.com", "-s", self.selector, "-b", "2048"],
            check=True,
            capture_output=True,
        )
        text = (dkim / f"{self.selector}.txt").read_text()
        self.dkim_record = "".join(text.split('"')[1::2])
        (dkim / "conf").write_text(
            f"Domain thetucks.com\nKeyFile {dkim}/{self.selector}.private\nSelector {self.selector}\n"
            f"Socket inet:{self.milter}@127.0.0.1\nMode s\nRequireSafeKeys false\nCanonicalization relaxed/simple\n"
            "SignHeaders From,To,Subject,Date,Message-ID,MIME-Version,Content-Type\nUserID root\nBackground no\n"
        )
        self.dkim = subprocess.Popen(["opendkim", "-f", "-x", dkim / "conf"])
        wait_for(lambda: listening(self.milter))

    def _configure(self, certificate: Path, key: Path) -> None:
        self.etc = self.folder / "etc"
        for name in ("etc", "etc/sasl", "queue", "data", "mail"):
            (self.folder / name).mkdir()
        shutil.chown(self.folder / "data", "postfix")
        (self.folder / "mail").chmod(0o777)
        database = self.etc / "sasl" / "db"
        subprocess.run(
            ["saslpasswd2", "-p", "-c", "-f", database, "-u", self.realm, self.user],
            input=self.password.encode(),
            check=True,
        )
        shutil.chown(database, "postfix")
        (self.etc / "sasl" / "smtpd.conf").write_text(  # Debian looks beside main.cf
            f"pwcheck_method: auxprop\nauxprop_plugin: sasldb\nmech_list: PLAIN LOGIN\nsasldb_path: {database}\n"
        )
        (self.etc / "main.cf").write_text(
            f"""compatibility_level = 3.6
queue_directory = {self.folder}/queue
data_directory = {self.folder}/data
maillog_file = {self.folder}/log
maillog_file_prefixes = {self.folder}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = mx.tests.example
mydestination =
local_recipient_maps =
virtual_mailbox_domains = static:all
virtual_mailbox_base = {self.folder}/mail
virtual_mailbox_maps = static:box/
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
virtual_minimum_uid = 1
default_transport = virtual:
disable_dns_lookups = yes
mynetworks = 127.0.0.0/8
message_size_limit = 60000000
virtual_mailbox_limit = 0
smtpd_milters = inet:127.0.0.1:{self.milter}
milter_default_action = tempfail
smtpd_tls_cert_file = {certificate}
smtpd_tls_key_file = {key}
smtpd_sasl_path = smtpd
smtpd_sasl_local_domain = {self.realm}
relay_domains_reject_code = 550
reject_code = 550
smtputf8_enable = yes
"""
        )
        host = "127.0.0.1:"
        login_first = "530 5.7.1 Authorization required. Ref. https://tests.example/smtp"
        outside = "-o mynetworks=192.0.2.0/24 -o virtual_mailbox_domains="
        (self.etc / "master.cf").write_text(
            f"""{host}{self.plain} inet n - n - - smtpd
{host}{self.relay} inet n - n - - smtpd -o content_filter=smtp:[127.0.0.1]:{self.seven_bit}
{host}{self.seven_bit} inet n - n - - smtpd -o smtpd_discard_ehlo_keywords=8bitmime,smtputf8 -o smtpd_milters=
{host}{self.strict} inet n - n - - smtpd {outside}
  -o {{smtpd_relay_restrictions=check_recipient_access,static:{{550 5.7.1 relaying denied}},reject}}
{host}{self.submission} inet n - n - - smtpd {outside} -o smtpd_tls_security_level=may -o smtpd_sasl_auth_enable=yes
  -o smtpd_tls_auth_only=yes -o smtpd_client_restrictions= -o smtpd_delay_reject=no
  -o {{smtpd_sender_restrictions=permit_sasl_authenticated,check_sender_access,static:{{{login_first}}}}}
  -o smtpd_relay_restrictions=permit_sasl_authenticated,reject
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
smtp unix - - n - - smtp
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
error unix - - n - - error
retry unix - - n - - error
tlsmgr unix - - n 1000? 1 tlsmgr
proxymap unix - - n - - proxymap
postlog unix-dgram n - n - 1 postlogd
"""
        )

    def take(self, count: int = 1) -> list[bytes]:
        """The next so many messages delivered, waiting for them; raises TimeoutError."""
        new = self.maildir / "new"

        def fresh() -> set[Path]:
            return set(new.iterdir()) - self.mails if new.exists() else set()

        try:
            wait_for(lambda: len(fresh()) >= count)
        except TimeoutError:
            raise TimeoutError((self.folder / "log").read_text()[-4000:]) from None
        found = sorted(fresh())
        self.mails |= set(found)
        assert len(found) == count
        return [path.read_bytes() for path in found]

    def stop(self) -> None:
        subprocess.run(["postfix", "-c", self.etc, "stop"], capture_output=True)
        os.kill(self.dkim.pid, signal.SIGKILL)
        self.dkim.wait()
        shutil.rmtree(self.folder)
