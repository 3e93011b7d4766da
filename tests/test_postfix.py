"""Through a real Postfix with OpenDKIM: accepted, signed by DKIM, delivered, and S/MIME still verifies."""

from __future__ import annotations

import re
import smtplib
from collections.abc import Iterator
from pathlib import Path

import dkim
import pytest
import trustme
from conftest import BOB, CAROL, SAMPLES, STEVE, STEVET, TESTS, Run, mail, need
from pki import Authority
from readers import Openssl
from servers import Postfix
from test_readers import inner

FANCY = TESTS / "fancy-HTML-to-smt.eml"
MULTIPART = dict(MIME_Version="1.0", Content_Type="multipart/mixed; boundary=b")
EIGHT_BIT = dict(MIME_Version="1.0", Content_Type="text/plain; charset=utf-8", Content_Transfer_Encoding="8bit")
HARD_CASES = {
    "eight bits": mail("Grüße\r\n".encode(), **EIGHT_BIT),
    "called 8bit": mail(b"a = b\r\n", **EIGHT_BIT),
    "called 8bit inside": mail(
        b"--b\r\nContent-Transfer-Encoding: 8bit\r\n\r\na = b\r\n--b--\r\n",
        **MULTIPART,
        Content_Transfer_Encoding="8bit",
    ),
    "binary": mail(
        b"--b\r\nContent-Type: image/x\r\nContent-Transfer-Encoding: binary\r\n\r\n\xff\0\r\x01\n--b--\r\n", **MULTIPART
    ),
    "eight bits in headers": mail(
        'Subject in a part\r\n--b\r\nContent-Type: text/plain; name="ä.txt"\r\n'
        "Content-Description: für Dich\r\n\r\nHello\r\n--b--\r\n".encode(),
        **MULTIPART,
        Comments="Grüße",
    ),
    "a long line": mail(b"x" * 1500 + b"\r\n"),
    "a long header line": mail(References=" ".join(f"<{n}@thetucks.com>" for n in range(80))),
    "NUL": mail(b"a\0b\r\n"),
    "a lone CR": mail(b"a\rb\r\n"),
    "From": mail(b"Hello\r\nFrom here on\r\n"),
    "blanks": mail(b"Hello \r\n\t\r\n-- \r\nSteve"),
    "dots": mail(b".\r\n..\r\n.leading\r\n"),
    "LF": mail(b"Hello\nSteve\n").replace(b"\r\n", b"\n"),
    "a forwarded message": mail(
        "--b\r\nContent-Type: message/rfc822\r\n\r\nFrom: Jörg <j@thetucks.com>\r\nSubject: Grüße \r\n\r\nTschüß \r\n"
        "--b--\r\n".encode(),
        **MULTIPART,
    ),
    "no body": mail(b""),
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's own TLS certificate and key, and the CA that certified it."""
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    server = ca.issue_cert("localhost")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    server.private_key_pem.write_to_path(folder / "key.pem")
    server.cert_chain_pems[0].write_to_path(folder / "server.pem")
    (folder / "key.pem").chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def postfix(certificates: Path) -> Iterator[Postfix]:
    need("postfix", "opendkim", "opendkim-genkey", "saslpasswd2", root=True)
    server = Postfix(certificates / "server.pem", certificates / "key.pem")
    yield server
    server.stop()


def report(security: str, port: int, user: str, password: str) -> str:
    """What the mission document shows, with the test's own port."""
    return (
        rf"Opened SMTP connection \({security}\)\nHost: localhost\nPort: {port}\nUser: \"{user}\"\n"
        rf"Password: \"{re.escape(password)}\"\nSending: {re.escape(str(FANCY))}\nFrom: Steve <steve@thetucks.com>\n"
        r"To: SteveT <steve.tuck@sparkpost.com>\nOK - in \d\.\d{3} seconds\n"
    )


def dkim_verifies(message: bytes, postfix: Postfix) -> bool:
    record = postfix.dkim_record.encode()
    names = [b"test._domainkey.thetucks.com."]
    return bool(dkim.verify(message, dnsfunc=lambda name, timeout=5: record if name in names else None))


def wire(message: bytes) -> bytes:
    """A delivered message, which a maildir holds with LF, as it crossed the network."""
    return message.replace(b"\n", b"\r\n")


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_signed_samples_verify_after_postfix_and_dkim(path: Path, run: Run, postfix: Postfix, openssl: Openssl) -> None:
    done = run(path, "--sign", "--send_smtp", SMTP_HOST="localhost", SMTP_PORT=str(postfix.plain))
    assert done.returncode == 0, done.stdout + done.stderr
    recipients = 3 if path.stem == "cc-and-bcc" else 1
    for message in postfix.take(recipients):
        assert dkim_verifies(wire(message), postfix)
        openssl.verify(inner(message))


def test_the_plain_transcript(run: Run, postfix: Postfix, openssl: Openssl, authority: Authority) -> None:
    arguments = (FANCY, "--sign", "--encrypt", "--send_smtp")
    done = run(*arguments, SMTP_HOST="localhost", SMTP_PORT=str(postfix.plain))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(report("plain", postfix.plain, "", ""), done.stdout.decode())
    (message,) = postfix.take()
    assert dkim_verifies(wire(message), postfix)
    content = openssl.verify(openssl.decrypt(inner(message), authority.identity(STEVET)))
    assert content.endswith(FANCY.read_bytes().split(b"\n\n", 1)[1].replace(b"\n", b"\r\n"))


def test_the_transcript_of_an_authenticated_submission(
    run: Run, postfix: Postfix, certificates: Path, openssl: Openssl, authority: Authority
) -> None:
    done = run(
        *(FANCY, "--sign", "--encrypt", "--send_smtp"),
        SMTP_HOST="localhost",
        SMTP_PORT=str(postfix.submission),
        SMTP_USER=postfix.user,
        SMTP_PASSWORD=postfix.password,
        SMTP_CA_FILE=str(certificates / "ca.pem"),
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(report("STARTTLS", postfix.submission, "SMTP_Injection", "*" * 40), done.stdout.decode())
    assert postfix.password.encode() not in done.stdout + done.stderr
    (message,) = postfix.take()
    assert dkim_verifies(wire(message), postfix)
    openssl.verify(openssl.decrypt(inner(message), authority.identity(STEVET)))


def test_a_wrong_password_is_refused(run: Run, postfix: Postfix, certificates: Path) -> None:
    done = run(
        *(FANCY, "--sign", "--send_smtp"),
        SMTP_HOST="localhost",
        SMTP_PORT=str(postfix.submission),
        SMTP_USER=postfix.user,
        SMTP_PASSWORD="wrong",
        SMTP_CA_FILE=str(certificates / "ca.pem"),
    )
    assert done.returncode == 1
    assert re.match(rb"\(535, b'5\.7\.8 Error: authentication failed", done.stderr)


def test_submission_without_a_login_shows_the_530_as_smtplib_gives_it(run: Run, postfix: Postfix) -> None:
    done = run(FANCY, "--sign", "--send_smtp", SMTP_HOST="localhost", SMTP_PORT=str(postfix.submission))
    assert done.returncode == 1
    assert re.fullmatch(
        rb"\(530, b'5\.7\.1 .*Authorization required\. Ref\. https://tests\.example/smtp', 'steve@thetucks\.com'\)\n",
        done.stderr,
    )


def test_relaying_denied_shows_the_550_as_smtplib_gives_it(run: Run, postfix: Postfix) -> None:
    done = run(*("-", "--sign", "--send_smtp"), data=mail(To=BOB), SMTP_HOST="localhost", SMTP_PORT=str(postfix.strict))
    assert done.returncode == 1
    assert re.fullmatch(rb"\{'bob\.lumreeker@gmail\.com': \(550, b'5\.7\.1 .*relaying denied'\)\}\n", done.stderr)


@pytest.mark.parametrize("name", HARD_CASES)
@pytest.mark.parametrize("options", ["--sign", "--sign --opaque", "--sign --encrypt"])
def test_hard_cases_verify_behind_a_relay_without_8bitmime(
    name: str, options: str, run: Run, postfix: Postfix, openssl: Openssl, authority: Authority
) -> None:
    settings = dict(SMTP_HOST="localhost", SMTP_PORT=str(postfix.relay))
    done = run("-", *options.split(), "--send_smtp", data=HARD_CASES[name], **settings)
    assert done.returncode == 0, done.stderr
    (message,) = postfix.take()
    assert dkim_verifies(wire(message), postfix)
    entity = inner(message)
    if "--encrypt" in options:
        entity = openssl.decrypt(entity, authority.identity(STEVET))
    openssl.verify(entity)


def test_the_relay_without_8bitmime_breaks_what_was_not_made_fit(run: Run, postfix: Postfix, openssl: Openssl) -> None:
    """The control of the test above: the same part, called 8bit after it was signed, no longer verifies."""
    output = run("-", "--sign", data=mail(b"a = b\r\n", Content_Type="text/plain")).stdout
    signed = output.replace(
        b"Content-Type: text/plain\r\n", b"Content-Type: text/plain\r\nContent-Transfer-Encoding: 8bit\r\n"
    )
    with smtplib.SMTP("localhost", postfix.relay) as session:
        session.sendmail(STEVE, [STEVET], signed)
    (message,) = postfix.take()
    assert b"a =3D b" in message
    with pytest.raises(AssertionError):
        openssl.verify(inner(message))


def test_each_bcc_recipient_gets_a_copy_that_the_others_do_not_show(
    run: Run, postfix: Postfix, openssl: Openssl, authority: Authority
) -> None:
    settings = dict(SMTP_HOST="localhost", SMTP_PORT=str(postfix.plain))
    done = run(TESTS / "cc-and-bcc.eml", "--sign", "--encrypt", "--send_smtp", **settings)
    assert done.returncode == 0, done.stderr
    copies = {re.search(rb"Delivered-To: (.*)", message)[1].decode(): message for message in postfix.take(3)}  # type: ignore[index]
    assert copies.keys() == {STEVET, BOB, CAROL}
    opened = {address: openssl.decrypt(inner(copy), authority.identity(address)) for address, copy in copies.items()}
    assert len(set(opened.values())) == 1
    openssl.verify(opened[CAROL])
    for address in (STEVET, BOB):
        with pytest.raises(AssertionError):
            openssl.decrypt(inner(copies[address]), authority.identity(CAROL))
        assert b"carol" not in copies[address].split(b"\n\n")[0]
