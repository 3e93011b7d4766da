"""What a hostile reading of the whole script found: mail lost in silence, the wrong key, a poisoned session."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from conftest import BOB, CAROL, STEVE, STEVET, Run, mail
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pki import NOW, Authority, certificate_pem, new_key
from readers import Openssl, command
from servers import free_port
from test_readers import inner


@pytest.mark.parametrize("name", ["Cc", "To", "Bcc", "BCC ", "Resent-Bcc", "Bcc\u00a0"])
@pytest.mark.parametrize("flags", [(), ("--sign", "--encrypt")])
def test_recipients_below_a_broken_header_line_are_not_lost(run: Run, name: str, flags: tuple[str, ...]) -> None:
    data = f"From: {STEVE}\nTo: {STEVET}\nSubject: hello\nwrapped by hand\n{name}: {BOB}\n\nHello\n".encode()
    done = run("-", *flags, data=data)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"'wrapped by hand'" in done.stderr


def test_a_body_that_speaks_of_recipients_is_no_header(run: Run) -> None:
    done = run("-", data=mail(b"Cc: nobody\r\n"))
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_root_without_the_intermediate_is_never_encrypted_for(
    run: Run, folder: Path, authority: Authority, openssl: Openssl
) -> None:
    identity = authority.identity(STEVET)
    (folder / f"{STEVET}.crt").write_bytes(certificate_pem(authority.root) + certificate_pem(identity.certificate))
    done = run("-", "--encrypt", data=mail())
    assert done.returncode == 0, done.stderr
    assert b"Hello Steve" in openssl.decrypt(inner(done.stdout), identity)


def test_a_self_signed_certificate_alone_is_the_recipients(run: Run, folder: Path) -> None:
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Self")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
    (folder / f"{STEVET}.crt").write_bytes(certificate_pem(builder.sign(key, hashes.SHA256())))
    assert run("-", "--encrypt", data=mail()).returncode == 0


def test_a_damaged_name_in_a_certificate_is_a_clear_error(run: Run, folder: Path, authority: Authority) -> None:
    der = bytearray(authority.identity(STEVET).certificate.public_bytes(Encoding.DER))
    der[der.index(b"Tests steve")] = 0xFF
    (folder / f"{STEVET}.crt").write_text(ssl.DER_cert_to_PEM_cert(bytes(der)))
    done = run("-", "--encrypt", data=mail())
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"{STEVET}.crt: no certificate can be read".encode() in done.stderr


@pytest.mark.parametrize("flag", ["--sign", "--encrypt"])
def test_a_key_for_pss_only_is_refused(run: Run, folder: Path, flag: str) -> None:
    address = STEVE if flag == "--sign" else STEVET
    words = ("openssl", "req", "-x509", "-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048", "-noenc", "-subj")
    files = ("-keyout", folder / f"{address}.pem", "-out", folder / f"{address}.crt")
    command(*words, "/CN=x", "-days", "1", *files)
    (folder / f"{address}.pem").chmod(0o600)
    done = run("-", flag, data=mail())
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"RSASSA-PSS only" in done.stderr


def test_parameters_that_confuse_the_library_give_no_traceback(run: Run) -> None:
    done = run("-", "--encrypt", data=mail("é\r\n".encode(), Content_Type="text/plain; name*=x; name*0=y"))
    assert done.returncode == 0, done.stderr


class Refusing:
    """Takes DATA from nobody, or from all but the first."""

    def __init__(self, always: bool) -> None:
        self.always, self.asked, self.taken = always, 0, list[str]()

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        self.taken += envelope.rcpt_tos
        return "250 OK"


class RefusingSmtp(SMTP):
    async def smtp_DATA(self, arg: str) -> None:
        self.event_handler.asked += 1
        if self.event_handler.always or self.event_handler.asked == 1:
            await self.push("451 4.7.1 try later")
        else:
            await super().smtp_DATA(arg)


@pytest.mark.parametrize(
    ("always", "code", "taken", "missed"), [(True, 75, [], b""), (False, 1, [STEVE, CAROL], STEVET.encode())]
)
def test_a_refused_data_command_does_not_harm_the_next_copy(
    run: Run, always: bool, code: int, taken: list[str], missed: bytes
) -> None:
    handler = Refusing(always)

    class Server(Controller):
        def factory(self) -> SMTP:
            return RefusingSmtp(self.handler)

    server = Server(handler, hostname="127.0.0.1", port=free_port())
    server.start()
    try:
        data = mail(Bcc=f"{STEVE}, {CAROL}")
        done = run("-", "--encrypt", "--send_smtp", data=data, SMTP_HOST="127.0.0.1", SMTP_PORT=str(server.port))
    finally:
        server.stop()
    assert (done.returncode, handler.taken) == (code, taken)
    told = b"sparkpostSMIME.py: not sent to " + missed + b"\n" if missed else b""
    assert done.stderr == b"(451, b'4.7.1 try later')\n" + told
