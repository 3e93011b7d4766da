"""What a hostile reading of the whole script found: mail lost in silence, the wrong key, a poisoned session."""

from __future__ import annotations

import datetime
import os
import re
import signal
import ssl
import subprocess
import sys
from contextlib import suppress
from email import message_from_bytes
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from conftest import BOB, CAROL, KEY_PASSWORD, SCRIPT, STEVE, STEVET, Run, mail
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from faulty import Fault, Serve, start_faulty  # noqa: F401, the fixture is used by name
from pki import (
    DAY,
    NOW,
    Authority,
    Identity,
    certificate_der,
    certificate_pem,
    certify,
    distinguished_name,
    key_pem,
    new_key,
)
from protected import fields_of
from readers import Openssl, command
from servers import free_port, wait_for
from test_certificates import (
    BOTH,
    CHAIN,
    CHECKS,
    ENCRYPT,
    EXPIRED,
    FILE,
    MALLORY,
    ROOT,
    SERVER,
    SIGN,
    STRANGERS,
    Desk,
    Make,
    both_ways,
    day,
    leaf,
    passed,
    prepare,  # noqa: F401, the fixture is used by name
    refused,
)
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


# ----------------------------------------------------------------------------------------------- whose certificate


@pytest.mark.parametrize("issuer", ["itself", "the recipient"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_newer_nameless_certificate_is_not_the_recipients(first: int, issuer: str, desk: Desk) -> None:
    key, name = new_key(), distinguished_name("Nameless")
    for make in (leaf(), EXPIRED):
        own = make(desk.authority, desk.authority.identity(STEVE).key)
        by = (name, key) if issuer == "itself" else (own.certificate.subject, own.key)
        nameless = Identity(STEVE, key, certify(name, key, *by, authority=None, begin=NOW), desk.authority)
        pair = [own.chain_pem, certificate_pem(nameless.certificate)]
        (desk.folder / FILE).write_bytes(pair[first] + pair[1 - first])
        done = desk.run("-", ENCRYPT, data=mail(To=STEVE))
        if make is EXPIRED:
            refused(done, FILE, day(-100))
        else:
            desk.opens(passed(done), ENCRYPT, own, nameless)


NAMELESS_EXPIRED = leaf(san=[], begin=NOW - 300 * DAY, days=200)


@pytest.mark.parametrize("marked", [True, None], ids=["root", "old root"])
@pytest.mark.parametrize(
    ("make", "words"), [(STRANGERS, MALLORY), (NAMELESS_EXPIRED, day(-100))], ids=["another's", "expired"]
)
def test_a_root_beside_a_faulty_leaf_is_not_the_recipient(
    make: Make, words: str, marked: bool | None, desk: Desk
) -> None:
    """The root that openssl makes has no key usage; without the intermediate nothing ties it to the leaf."""
    own, key, name = desk.give(make), new_key(), distinguished_name("Home Root")
    root = certify(name, key, name, key, authority=marked, usages=[], begin=NOW - DAY)
    (desk.folder / FILE).write_bytes(certificate_pem(own.certificate) + certificate_pem(root))
    refused(desk.run("-", ENCRYPT, data=mail(To=STEVE)), FILE, words)


def test_the_file_of_an_archive_may_have_any_name(desk: Desk) -> None:
    name = os.fsdecode(b"b\xffd@example.com")
    owner = desk.authority.issue(BOB, desk.authority.identity(BOB).key, san=[])
    owner.write(desk.folder, name=name)
    done = desk.run("-", ENCRYPT, "--archive", name, data=mail(To=STEVE))
    desk.opens(passed(done, "names no address"), ENCRYPT, owner)


def test_a_nameless_authority_alone_is_not_the_recipient(desk: Desk) -> None:
    by = (desk.authority.root.subject, desk.authority.root_key)
    nameless = certify(distinguished_name("Nameless"), new_key(), *by, authority=True, usages=[])
    (desk.folder / FILE).write_bytes(certificate_pem(nameless))
    done = desk.run("-", ENCRYPT, data=mail(To=STEVE))
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
    assert FILE.encode() in done.stderr


def test_a_letter_that_only_looks_like_k_is_not_k(desk: Desk) -> None:
    mark = "mark@bank.com"
    desk.authority.issue(mark, new_key(), san=[], utf8=["mar\u212a@bank.com"]).write(desk.folder)
    refused(desk.run("-", ENCRYPT, data=mail(To=mark)), f"{mark}.crt", "belongs to mar\u212a@")


# ---------------------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize(
    ("domain", "names", "good"),
    [
        ("thetucks.com", {"san": [STEVE]}, True),
        ("example.com", {"san": [STEVE]}, False),
        ("example.com", {"san": [], "subject": [STEVE]}, False),
        ("example.com", {"san": [], "utf8": [STEVE]}, False),
        ("example.com", {"san": [MALLORY], "subject": [STEVE]}, False),
    ],
)
def test_an_authority_limited_to_a_domain_vouches_for_no_other(
    domain: str, names: dict[str, list[str]], good: bool, desk: Desk
) -> None:
    limited, name = Authority(), distinguished_name("Limited")
    limits = x509.NameConstraints([x509.RFC822Name(domain)], None)
    by = (limited.root.subject, limited.root_key)
    limited.intermediate = certify(name, limited.intermediate_key, *by, authority=True, more=[limits])
    (desk.folder / ROOT).write_bytes(certificate_pem(limited.root))
    desk.give(lambda _, key: limited.issue(STEVE, key, **names))  # type: ignore[arg-type]
    for flag in BOTH:
        passed(desk.check(flag)) if good else refused(desk.check(flag), CHAIN, FILE)


@pytest.mark.parametrize("changed", ["root", "intermediate"])
@pytest.mark.parametrize(
    ("options", "good"),
    [({"usages": []}, True), ({"usages": ["digital_signature"]}, False), ({"days": 900}, False)],
    ids=["no key usage", "not for certificates", "expired"],
)
def test_an_authority_may_lack_key_usage_but_not_be_expired(
    changed: str, options: dict[str, object], good: bool, desk: Desk
) -> None:
    other = Authority()
    subject, key = getattr(other, changed).subject, getattr(other, f"{changed}_key")
    by = (other.root.subject, other.root_key)
    setattr(other, changed, certify(subject, key, *by, authority=True, **options))  # type: ignore[arg-type]
    (desk.folder / ROOT).write_bytes(certificate_pem(other.root))
    desk.give(lambda _, key: other.issue(STEVE, key))
    for flag in BOTH:
        passed(desk.check(flag)) if good else refused(desk.check(flag), CHAIN, FILE)


def test_a_root_of_openssl_is_an_authority(desk: Desk) -> None:
    other, name = Authority(), "/CN=Tests Root"
    (desk.folder / "ca.key").write_bytes(key_pem(other.root_key))
    command("openssl", "req", "-x509", "-key", desk.folder / "ca.key", "-subj", name, "-out", desk.folder / ROOT)
    other.root = x509.load_pem_x509_certificate((desk.folder / ROOT).read_bytes())
    desk.give(lambda _, key: other.issue(STEVE, key))
    passed(desk.check(SIGN, ENCRYPT))


# ----------------------------------------------------------------------------------- the command line and warnings


@both_ways
def test_quiet_does_not_silence_a_skipped_check(flag: str, desk: Desk) -> None:
    desk.give(
        lambda _, key: Authority().issue(STEVE, key, NOW - 300 * DAY, 200, san=[MALLORY], purposes=[SERVER]), "rsa-1024"
    )
    done = desk.check(flag, "--quiet", "--skip_checks", ",".join(CHECKS))
    passed(done, day(-100), MALLORY, "extended key usage", "1024", "no valid chain")


@pytest.mark.parametrize("option", ["--ca_file", "--env_file", "--sent", "--report"])
def test_an_empty_name_is_not_no_name(option: str, run: Run, folder: Path) -> None:
    (folder / "a.eml").write_bytes(mail())
    variables = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(free_port())}
    done = run("a.eml", SIGN, "--send_smtp", option, "", **variables)
    assert (done.returncode, done.stdout) == (2, b"")
    assert option in done.stderr.decode().splitlines()[-1]


def test_warnings_about_several_files_name_each(run: Run, folder: Path) -> None:
    for number in "12":
        (folder / f"{number}.eml").write_bytes(mail(Date=f"Tue, 0{number} Oct 2019 10:00:00 +0000"))
    lines = run("1.eml", "2.eml", SIGN).stderr.decode().splitlines()
    assert [line[:43] for line in lines] == [f"sparkpostSMIME.py: warning: {each}.eml: the Date" for each in "12"]


def test_an_archive_with_another_kind_of_key_is_warned_of(desk: Desk) -> None:
    archive = desk.authority.identity(BOB, "P-256")
    archive.write(desk.folder)
    entity = passed(desk.check(ENCRYPT, "--archive", BOB), "RSA and elliptic curve")
    desk.opens(entity, ENCRYPT, archive)
    desk.opens(entity, ENCRYPT, desk.authority.identity(STEVE))


# ------------------------------------------------------------------------------------------------------- key files

ODD = [x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.2.3.4.{last}"), b"\5\0") for last in (5, 6)]
OTHER = x509.OtherName(x509.ObjectIdentifier("1.2.3.4.7"), b"\5\0")
OID = bytes([0x06, 0x04, 0x2A, 3, 4])  # 1.2.3.4, and one number to follow


@both_ways
@pytest.mark.parametrize(
    ("old", "new"),
    [(OID + b"\6", OID + b"\5"), (b"\xa0\x0a" + OID, b"\xa5\x0a" + OID), (b"\xa0\x0a" + OID, b"\xa3\x0a" + OID)],
    ids=["repeated extension", "ediPartyName", "x400Address"],
)
def test_a_certificate_that_the_library_cannot_parse_is_a_clear_error(
    old: bytes, new: bytes, flag: str, desk: Desk
) -> None:
    own, by = desk.authority.identity(STEVE), (desk.authority.intermediate.subject, desk.authority.intermediate_key)
    names = [x509.RFC822Name(STEVE), OTHER]
    der = certificate_der(certify(own.certificate.subject, own.key, *by, names=names, more=ODD))
    assert der.count(old) == 1
    (desk.folder / FILE).write_bytes(der.replace(old, new))
    refused(desk.check(flag), FILE, "no certificate can be read")


@both_ways
def test_pkcs12_without_passphrase_opens_beside_one_that_has_it(flag: str, desk: Desk) -> None:
    desk.put("p12", desk.authority.identity(STEVE).pkcs12())
    passed(desk.check(flag, SMIME_KEY_PASSWORD=KEY_PASSWORD))


@both_ways
@pytest.mark.parametrize("password", ["", KEY_PASSWORD])
def test_pem_under_the_name_of_pkcs12_is_a_clear_error(password: str, flag: str, desk: Desk) -> None:
    own = desk.authority.identity(STEVE)
    desk.put("p12", key_pem(own.key) + own.chain_pem)
    refused(desk.check(flag, SMIME_KEY_PASSWORD=password), rf"{STEVE}\.p12", "PKCS #12")


@pytest.mark.parametrize("bits", ["512", "1024"])
def test_a_key_too_small_for_pss_is_a_clear_error(bits: str, desk: Desk) -> None:
    files = ("-keyout", desk.folder / f"{STEVE}.pem", "-out", desk.folder / FILE)
    command("openssl", "req", "-x509", "-newkey", f"rsa:{bits}", "-noenc", "-subj", "/CN=x", "-days", "99", *files)
    done = desk.run("-", SIGN, "--rsa_padding", "pss_oaep", "--skip_checks", "key_size", data=mail())
    if bits == "512":
        assert (done.returncode, done.stdout) == (1, b"")
        errors = [line for line in done.stderr.splitlines() if b": warning: " not in line]
        assert len(errors) == 1 and b"too small" in errors[0], done.stderr
    else:
        passed(done, bits, "names no address")


# ------------------------------------------------------------------------------------------------ protected headers


def protected(run: Run, openssl: Openssl, identity: Identity, **fields: str) -> tuple[bytes, bytes]:
    """The message that the program prints, encrypted with its header protected, and what its recipient opens."""
    done = run("-", ENCRYPT, "--protect_headers", data=mail(b"Hello\r\n", **fields))
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout, openssl.decrypt(inner(done.stdout), identity)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"", {"Content_Type": "text/plain; charset=ansi"}),
        (b"", {"Content_Type": "text/html; charset=idna"}),
        (b"a..b", {"Content_Type": "text/html; charset=idna"}),
        (b"a", {"Subject": "=?utf-7?Q?+2AA-?="}),
    ],
)
def test_text_that_cannot_be_decoded_gives_no_traceback(body: bytes, fields: dict[str, str], run: Run) -> None:
    done = run("-", ENCRYPT, "--protect_headers", data=mail(body, **fields))
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "parameter",
    ["name=report(1).pdf", "name*=UTF-8''report%20(1).pdf", 'x=(a;b); name="(c).pdf"', "charset=us-ascii (; name=d)"],
)
def test_what_parentheses_hold_in_a_parameter_stays(parameter: str, run: Run) -> None:
    done = run("-", SIGN, "--protect_headers", data=mail(Content_Type=f"text/plain (a (; b)); {parameter}"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert f'Content-Type: text/plain;\r\n\thp="clear"; {parameter}\r\n'.encode() in done.stdout


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ('multipart/mixed; type="a" (was; hp=1); boundary="b"', '; type="a" (was; hp=1); boundary="b"'),
        ('text/plain; (c) hp-legacy-display="1"', ""),
        ('text/plain; (c) hp="cipher"; name=a', "; name=a"),
        ('text/plain; hp="cipher" name=a', "; name=a"),
    ],
)
def test_comments_neither_hide_nor_end_a_parameter(kind: str, left: str, run: Run) -> None:
    done = run("-", SIGN, "--protect_headers", data=mail(b"--b--\r\n", Content_Type=kind))
    assert (done.returncode, done.stderr) == (0, b"")
    assert f'hp="clear"{left}\r\n'.encode() in done.stdout


def test_parts_between_boundaries_with_parentheses_stay(run: Run) -> None:
    body = b"--a(1)b\n\none\n--a(1)b\n\ntwo\n--a(1)b--\n"
    done = run("-", SIGN, "--protect_headers", data=mail(body, Content_Type="multipart/mixed; boundary=a(1)b"))
    (content, _) = message_from_bytes(done.stdout).get_payload()
    assert [part.get_payload() for part in content.get_payload()] == ["one", "two"]


@pytest.mark.parametrize("kind", ['text/plain; charset=utf-8 (it"s me)', 'text/plain; name="foo'])
def test_no_odd_content_type_hides_the_protection(kind: str, run: Run, openssl: Openssl, authority: Authority) -> None:
    _, payload = protected(run, openssl, authority.identity(STEVET), Content_Type=kind)
    assert message_from_bytes(payload).get_param("hp") == "cipher"


def test_the_outer_field_is_told_as_it_is(run: Run, openssl: Openssl, authority: Authority, folder: Path) -> None:
    joerg = authority.issue("j\u00f6rg@e.f", authority.identity(BOB).key, utf8=["j\u00f6rg@e.f"])
    joerg.write(folder)
    message, payload = protected(run, openssl, joerg, To='"J\u00f6rg" <j\u00f6rg@e.f>')
    outside = [value for name, value in fields_of(message) if name == "to"]
    told = [value for name, value in fields_of(payload) if name == "hp-outer" and value.startswith("To: ")]
    assert ["".join(value.split()) for value in told] == ["".join(f"To: {value}".split()) for value in outside]


def token(letters: int) -> bytes:
    return mail().replace(b"Subject:", b"X-Token:\r\n " + b"x" * letters + b"\r\nSubject:")


def test_a_long_word_stays_on_a_line_of_its_own_under_a_signature(run: Run, openssl: Openssl) -> None:
    done = run("-", SIGN, "--protect_headers", data=token(990))
    assert (done.returncode, done.stderr) == (0, b"")
    assert max(map(len, done.stdout.split(b"\r\n"))) <= 998
    assert b"x" * 990 in openssl.verify(inner(done.stdout))


def test_a_word_too_long_for_any_line_needs_an_opaque_signature(run: Run, openssl: Openssl) -> None:
    refused(run("-", SIGN, "--protect_headers", data=token(1200)), "--opaque")
    done = run("-", SIGN, "--opaque", "--protect_headers", data=token(1200))
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"x" * 1200 in openssl.verify(inner(done.stdout))


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", ["connect", "dot"])
def test_a_signal_ends_a_single_message_with_one_line(
    stage: str, number: signal.Signals, folder: Path, serve: Serve
) -> None:
    server = serve({stage: Fault.SILENCE})
    (folder / "a.eml").write_bytes(mail())
    words: list[str | Path] = [sys.executable, SCRIPT, "a.eml", "--send_smtp"]
    variables = {"SMTP_HOST": "localhost", "SMTP_PORT": str(server.port)}
    with subprocess.Popen(words, cwd=folder, env=variables, stderr=subprocess.PIPE) as process:
        try:
            wait_for(lambda: server.mails if stage == "dot" else server.busy)
            process.send_signal(number)
            _, told = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, told.count(b"\n")) == (75, 1), told
    assert re.fullmatch(rb"sparkpostSMIME\.py: [^\n]*may have been sent\n", told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_a_run_that_waits_before_its_first_message(number: signal.Signals, folder: Path) -> None:
    os.mkfifo(folder / "roots")
    ends: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # as long as nobody reads
            ends.append(os.open(folder / "roots", os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    words: list[str | Path] = [sys.executable, SCRIPT, "a.eml", "b.eml", "--ca_file", "roots"]
    with subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE) as process:
        try:
            wait_for(is_read)
            process.send_signal(number)
            _, told = process.communicate(timeout=20)
        finally:
            process.kill()
    os.close(*ends)
    assert (process.returncode, told) == (-number, b"")
