"""Stronger cryptography that is asked for: elliptic curves, RSASSA-PSS, RSAES-OAEP, AES-GCM; and who can read it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from conftest import BOB, CAROL, SCRIPT, STEVE, STEVET, Run, mail
from faulty import (  # the fixtures among them are used by name
    Open,
    Send,
    patched,
    send_by_smtp,  # noqa: F401
    start_mailbox,  # noqa: F401
)
from pki import Authority, Identity, key_pem
from readers import Gpgsm, Nss, Openssl, command, cut_signed, der_of, pkcs12
from test_readers import inner

P256, P384, P521 = "p-256@thetucks.com", "p-384@thetucks.com", "p-521@thetucks.com"
KINDS = {STEVET: "rsa", BOB: "rsa", P256: "P-256", P384: "P-384", P521: "P-521"}
TEXT = b"Content-Type: text/plain\r\n\r\nHello Steve\r\n"
OAEP, GCM = ("--rsa_padding", "pss_oaep"), ("--cipher", "aes256-gcm")
FORMS = {"cbc": (), "cbc-oaep": OAEP, "gcm": GCM, "gcm-oaep": GCM + OAEP}
OIDS = {"rsa": "1.2.840.113549.1.1.1", "oaep": "1.2.840.113549.1.1.7", "ec": "1.2.840.10045.2.1"}
OIDS |= {"ecdh": "1.3.132.1.11.1", "cbc": "2.16.840.1.101.3.4.1.42", "gcm": "2.16.840.1.101.3.4.1.46"}
SEED, CHANGES = 20_241_124, 60  # of the changed bytes

Make = Callable[..., bytes]


@pytest.fixture(autouse=True)
def write_certificates(folder: Path, authority: Authority) -> None:
    for address in KINDS:
        person(authority, address).write(folder)


def person(authority: Authority, address: str) -> Identity:
    return authority.identity(address, KINDS[address])


@pytest.fixture(name="make")
def make_entity(run: Run) -> Make:
    """The entity that the program prints for these recipients; it must warn of the mixed ones, and of nothing else."""

    def make(recipients: Sequence[str], *arguments: str) -> bytes:
        done = run("-", *arguments, data=mail(To=", ".join(recipients)))
        assert done.returncode == 0, done.stderr
        mixed = "--encrypt" in arguments and len({KINDS.get(address) == "rsa" for address in recipients}) == 2
        assert (b"warning" in done.stderr) == mixed == bool(done.stderr), done.stderr
        return inner(done.stdout)

    return make


class Node(NamedTuple):
    """An element of DER: its tag, where it starts, where its content does, its end, and what it is made of."""

    tag: int
    start: int
    body: int
    end: int
    children: list[Node]


def parse(der: bytes, start: int = 0, end: int | None = None) -> list[Node]:
    """The elements side by side here, if they are DER and not only BER (X.690 sections 10 and 11)."""
    nodes, end = [], len(der) if end is None else end
    while start < end:
        body, size = start + 2, der[start + 1]
        if size >= 0x80:
            body += size - 0x80
            size = int.from_bytes(der[start + 2 : body], "big")
            assert size >= 0x80 and der[start + 2], "a length that is indefinite, or longer than need be"
        stop = body + size
        assert stop <= end
        children = parse(der, body, stop) if der[start] & 0x20 else []
        parts = [der[child.start : child.end] for child in children]
        assert der[start] != 0x31 or parts == sorted(parts), "a SET OF out of order"
        assert der[start] != 0x02 or size == 1 or int.from_bytes(der[body : body + 2], "big") >> 7 not in (0, 0x1FF)
        nodes.append(Node(der[start], start, body, stop, children))
        start = stop
    return nodes


def spread(nodes: Sequence[Node]) -> list[Node]:
    return [each for node in nodes for each in (node, *spread(node.children))]


def openssl_cms(der: bytes, *words: str | Path) -> bytes:
    return command("openssl", "cms", "-inform", "DER", *words, data=der)


def check_structure(der: bytes, kinds: Sequence[str], form: str) -> None:
    """What RFC 5652 section 6, RFC 5083, RFC 5084, RFC 5753 and RFC 4055 say of an envelope; ktri come before kari."""
    tree = parse(der)
    assert len(tree) == 1
    assert openssl_cms(der, "-cmsout", "-outform", "DER") == der
    text = openssl_cms(der, "-cmsout", "-print", "-noout").decode()
    gcm, oaep, rsa, ec = "gcm" in form, "oaep" in form, kinds.count("rsa"), len(kinds) - kinds.count("rsa")
    assert (text.count("d.ktri:"), text.count("d.kari:")) == (rsa, ec)
    assert ("id-smime-ct-authEnvelopedData" in text, "pkcs7-envelopedData" in text) == (gcm, not gcm)
    assert re.findall(r" version: (\d+)", text) == ["2" if ec and not gcm else "0"] + ["0"] * rsa + ["3"] * ec
    algorithms = [OIDS["oaep" if oaep else "rsa"]] * rsa + [OIDS["ec"], OIDS["ecdh"]] * ec
    assert re.findall(r" algorithm: \S+ \((\S+)\)", text) == [*algorithms, OIDS["gcm" if gcm else "cbc"]]
    parameters = ["sha256", "mgf1", "sha256"] * oaep * rsa + ["id-aes256-wrap"] * ec
    assert re.findall(r" OBJECT {2,}:(\S+)", text) == parameters
    assert text.count("parameter: NULL") == (0 if oaep else rsa)
    assert text.count("contentType: pkcs7-data") == 1
    if gcm:
        nonce, length = tree[0].children[1].children[0].children[2].children[1].children[1].children
        tag = tree[0].children[1].children[0].children[-1]
        assert (nonce.end - nonce.body, der[length.start : length.end]) == (12, b"\x02\x01\x10")
        assert (tag.tag, tag.end - tag.body) == (0x04, 16)


# --------------------------------------------------------------------------------------------------- what is made

RECIPIENTS = {"rsa": (STEVET,), "P-256": (P256,), "P-384": (P384,), "P-521": (P521,), "two RSA": (STEVET, BOB)}
RECIPIENTS |= {"mixed": (P256, STEVET, P521, BOB)}


@pytest.mark.parametrize("signed", [False, True], ids=["", "signed"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipients", RECIPIENTS.values(), ids=RECIPIENTS)
def test_every_form_opens_for_every_recipient_and_for_nobody_else(
    recipients: tuple[str, ...], form: str, signed: bool, make: Make, openssl: Openssl, authority: Authority
) -> None:
    entity = make(recipients, "--encrypt", *(["--sign"] if signed else []), *FORMS[form])
    kind = b"authEnveloped-data" if "gcm" in form else b"enveloped-data"
    assert entity.startswith(b"Content-Type: application/pkcs7-mime; smime-type=%b;\r\n" % kind)
    check_structure(der_of(entity), [KINDS[address] for address in recipients], form)
    opened = {openssl.decrypt(entity, person(authority, address)) for address in recipients}
    assert len(opened) == 1
    content = opened.pop()
    assert (openssl.verify(content) if signed else content) == TEXT
    stranger = openssl.folder / "stranger.pem"
    stranger.write_bytes(key_pem(authority.identity(CAROL, KINDS[recipients[0]]).key))
    words = ("openssl", "cms", "-decrypt", "-inform", "DER", "-inkey", stranger)  # tried on every recipient's part
    assert b"Hello" not in subprocess.run(words, input=der_of(entity), capture_output=True, timeout=60).stdout


# ------------------------------------------------------------------------------------------- names and numbers

ODD = {  # OpenSSL's bit for the string type, and the serial number
    "T61String, negative": (0x4, "-5"),
    "BMPString, 20 bytes": (0x800, "0x7f" + "ab" * 19),
    "UTF8String, leading zero": (0x2000, "0x80"),
}


@pytest.mark.parametrize(("mask", "serial"), ODD.values(), ids=ODD)
@pytest.mark.parametrize(("to", "arguments"), [(STEVET, ()), (STEVET, OAEP), (P256, ())], ids=["rsa", "oaep", "ec"])
def test_a_certificate_is_named_by_the_bytes_that_it_has(
    mask: int, serial: str, to: str, arguments: tuple[str, ...], make: Make, folder: Path, authority: Authority
) -> None:
    """T61String holds Latin-1, as some authorities write it; two attributes share an RDN."""
    name = f"[req]\ndistinguished_name = name\nprompt = no\nstring_mask = MASK:{mask}\n"
    name += "[name]\nC = DE\nO = M\xfcller\n+OU = Abteilung \xe9\nCN = Odd \xdf\n"
    (folder / "odd.cnf").write_text(name, encoding="latin-1")
    (folder / "ca.key").write_bytes(key_pem(person(authority, P521).key))
    (folder / "leaf.key").write_bytes(key_pem(person(authority, to).key))
    words: list[str | Path] = ["openssl", "req", "-x509", "-new", "-config", folder / "odd.cnf", "-days", "60", "-key"]
    command(*words, folder / "ca.key", "-out", folder / "ca.crt")
    words += [folder / "leaf.key", "-CA", folder / "ca.crt", "-CAkey", folder / "ca.key", "-set_serial", serial]
    command(
        *words,
        "-subj",
        "/CN=Leaf",
        "-addext",
        f"subjectAltName=email:{to}",
        *("-addext", "authorityKeyIdentifier=none"),
        "-out",
        folder / f"{to}.crt",
    )
    der = command("openssl", "x509", "-in", folder / f"{to}.crt", "-outform", "DER")
    _, number, _, issuer, *_ = parse(der)[0].children[0].children
    message = der_of(make([to], "--encrypt", *arguments))
    assert der[issuer.start : issuer.end] + der[number.start : number.end] in message
    own = ("-recip", folder / f"{to}.crt", "-inkey", folder / "leaf.key")
    assert openssl_cms(message, "-decrypt", *own) == TEXT


# ------------------------------------------------------------------------------------------------ what is sent


@pytest.mark.parametrize("form", ["cbc", "gcm-oaep"])
def test_rsa_and_elliptic_curve_recipients_are_sent_copies_of_their_own(
    form: str, send: Send, open_mailbox: Open, authority: Authority, openssl: Openssl, gpgsm: Gpgsm, nss: Nss
) -> None:
    mailbox = open_mailbox()
    data = mail(To=f"{P521}, {STEVET}", Cc=P256, Bcc=f"{BOB}, {P384}")
    outcome = send(mailbox, data, "--sign", "--encrypt", *FORMS[form])
    assert (outcome.code, outcome.err) == (0, "")
    copies = {tuple(each.rcpt_tos): each.content for each in mailbox.mails}
    assert set(copies) == {(STEVET,), (P521, P256), (BOB,), (P384,)}
    assert len(mailbox.mails) == 4
    headers = {content[: content.index(b"Content-Type:")] for content in copies.values()}
    assert len(headers) == 1
    assert not re.search(rb"(?i)bcc|bob|p-384", headers.pop())
    opened = set()
    for recipients, content in copies.items():
        check_structure(der_of(inner(content)), [KINDS[address] for address in recipients], form)
        opened |= {openssl.decrypt(inner(content), person(authority, address)) for address in recipients}
    assert len(opened) == 1
    signed = opened.pop()
    assert openssl.verify(signed) == gpgsm.verify(signed) == TEXT
    nss.verify(signed)
    if form == "cbc":
        assert gpgsm.decrypt(inner(copies[STEVET,])) == nss.decrypt(inner(copies[STEVET,])) == signed


@pytest.mark.parametrize("form", ["cbc", "gcm-oaep"])
def test_the_archive_opens_every_copy_and_is_sent_none(
    form: str, send: Send, open_mailbox: Open, openssl: Openssl, authority: Authority
) -> None:
    mailbox = open_mailbox()
    data = mail(To=f"{STEVET}, {P256}", Bcc=BOB)
    assert send(mailbox, data, "--encrypt", "--archive", CAROL, *FORMS[form]).code == 0
    assert sorted(each.rcpt_tos for each in mailbox.mails) == sorted([[STEVET], [P256], [BOB]])
    for each in mailbox.mails:
        assert CAROL.encode() not in each.content
        assert openssl.decrypt(inner(each.content), authority.identity(CAROL)) == TEXT


# -------------------------------------------------------- who can read what: openssl, gpgsm and NSS as in Debian 12


def can(read: Callable[..., object], *arguments: object) -> str:
    try:
        read(*arguments)
    except AssertionError:
        return "no"
    return "yes"


SIGNATURES = [
    ("rsa", (), "yes yes yes"),
    ("rsa", OAEP, "yes yes yes"),
    ("P-256", (), "yes yes yes"),
    ("P-384", OAEP, "yes no yes"),  # gpgsm wants a digest as long as the key
    ("P-521", (), "yes no yes"),
]


@pytest.mark.parametrize(("kind", "padding", "table"), SIGNATURES)
def test_signatures_and_who_can_verify_them(
    kind: str, padding: tuple[str, ...], table: str, make: Make, folder: Path, authority: Authority,
    openssl: Openssl, gpgsm: Gpgsm, nss: Nss,
) -> None:  # fmt: skip
    authority.identity(STEVE, kind).write(folder, private=True)
    entity = make([STEVET], "--sign", *padding)
    assert [can(reader.verify, entity) for reader in (openssl, gpgsm, nss)] == table.split()
    opaque = make([STEVET], "--sign", "--opaque", *padding)
    assert openssl.verify(entity) == openssl.verify(opaque) == TEXT
    for der in (cut_signed(entity)[1], der_of(opaque)):
        assert parse(der) and openssl_cms(der, "-cmsout", "-outform", "DER") == der
        text = openssl_cms(der, "-cmsout", "-print", "-noout").decode().partition("signerInfos:")[2]
        assert re.findall(r" version: (\d+)", text) == ["1"]
        assert ("rsassaPss" in text, "ecdsa-with-SHA" in text) == (kind == "rsa" and padding == OAEP, kind != "rsa")
        if "rsassaPss" in text:
            assert re.findall(r" OBJECT {2,}:(sha.*|mgf1)", text) == ["sha256", "mgf1", "sha256"]
            assert re.search(r"cont \[ 2 \] *\n[^\n]*INTEGER +:20\n", text)


ENVELOPES = [  # and the owner of the first certificate
    ((STEVET,), "cbc", "yes yes yes"),
    ((STEVET,), "cbc-oaep", "yes no no"),
    ((STEVET,), "gcm", "yes no no"),
    ((STEVET, P256), "cbc", "yes yes no"),
    ((P256,), "cbc", "yes no no"),  # gpgsm dies of importing such a key; with one of its own it opens none either
    ((P256,), "gcm", "yes no no"),
]


@pytest.mark.parametrize(("recipients", "form", "table"), ENVELOPES)
def test_envelopes_and_who_can_open_them(
    recipients: tuple[str, ...], form: str, table: str, make: Make, authority: Authority,
    openssl: Openssl, gpgsm: Gpgsm, nss: Nss,
) -> None:  # fmt: skip
    entity = make(recipients, "--encrypt", *FORMS[form])
    owner = person(authority, recipients[0])
    if owner.address == P256:
        command("pk12util", "-i", pkcs12(owner, nss.folder), "-d", nss.store, "-W", "x", "-K", "")
    opens = [can(openssl.decrypt, entity, owner), can(gpgsm.decrypt, entity), can(nss.decrypt, entity)]
    assert opens == table.split()


# ------------------------------------------------------------------------------------------------ changed bytes


def changed(data: bytes, where: int, random: Random) -> bytes:
    return data[:where] + bytes([data[where] ^ random.randrange(1, 256)]) + data[where + 1 :]


@pytest.mark.parametrize(
    ("kind", "padding"), [("rsa", ()), ("rsa", OAEP), ("P-256", ())], ids=["pkcs1v15", "pss", "ecdsa"]
)
def test_any_changed_byte_of_what_is_signed_is_found(
    kind: str, padding: tuple[str, ...], make: Make, root: bytes, folder: Path, authority: Authority
) -> None:
    """In the signed part, the signed attributes and the signature; the rest only says who signed, and how."""
    authority.identity(STEVE, kind).write(folder, private=True)
    content, der = cut_signed(make([STEVET], "--sign", *padding))
    signer = parse(der)[0].children[1].children[0].children[-1].children[0].children
    attributes, value = signer[3], signer[5]
    assert (attributes.tag, value.tag) == (0xA0, 0x04)
    places = [*range(attributes.start, attributes.end), *range(value.start, value.end)]
    (roots := folder / "root.pem").write_bytes(root)

    def verifies(content: bytes, der: bytes) -> str:
        (path := folder / "content").write_bytes(content)
        return can(openssl_cms, der, "-verify", "-binary", "-purpose", "smimesign", "-CAfile", roots, "-content", path)

    assert verifies(content, der) == "yes"
    random = Random(SEED)
    for number in range(CHANGES):
        where = random.choice(places) if number % 2 else random.randrange(len(content))
        pair = (content, changed(der, where, random)) if number % 2 else (changed(content, where, random), der)
        assert verifies(*pair) == "no", (SEED, number, where)


@pytest.mark.parametrize(
    ("to", "form"), [(STEVET, "gcm"), (STEVET, "gcm-oaep"), (P256, "gcm")], ids=["pkcs1v15", "oaep", "ecdh"]
)
def test_any_changed_byte_of_an_aes_gcm_message_is_found(
    to: str, form: str, make: Make, folder: Path, authority: Authority
) -> None:
    """In text, tag, nonce and keys. openssl passes over versions and some algorithm names: they change nothing read."""
    der = der_of(make([to], "--encrypt", *FORMS[form]))
    (key := folder / "key").write_bytes(key_pem(person(authority, to).key))
    own = ("-decrypt", "-recip", folder / f"{to}.crt", "-inkey", key)
    secret = [place for node in spread(parse(der)) if node.tag in (0x04, 0x80) for place in range(node.body, node.end)]
    assert len(secret) > len(TEXT) + 16 + 12 + 32
    assert openssl_cms(der, *own) == TEXT
    random = Random(SEED)
    for number in range(CHANGES):
        where = random.choice(secret) if number % 2 else random.randrange(len(der))
        try:
            text = openssl_cms(changed(der, where, random), *own)
        except AssertionError:
            continue
        assert where not in secret and text == TEXT, (SEED, number, where)


# ----------------------------------------------------------------------------------------------- the default path


@pytest.mark.parametrize(
    ("to", "arguments", "code"), [(STEVET, (), 0), (STEVET, GCM, 1), (STEVET, OAEP, 1), (P256, (), 1)]
)
def test_the_default_never_touches_the_der_writer(to: str, arguments: tuple[str, ...], code: int, folder: Path) -> None:
    sections = re.split(r"(?m)^# -{20,} (.*)$", SCRIPT.read_text())
    writer = dict(zip(sections[1::2], sections[2::2], strict=True))
    names = re.findall(r"(?m)^def (\w+)", "".join(text for title, text in writer.items() if "DER" in title))
    assert "enveloped_data" in names
    patch = "def broken(*values, **named):\n    raise program.Error('the DER writer')\n"
    patch += "".join(f"assert callable(program.{name}); program.{name} = broken\n" for name in names)
    words = [*patched(patch), "-", "--sign", "--encrypt"]
    done = subprocess.run([*words, *arguments], cwd=folder, input=mail(To=to), capture_output=True, timeout=60)
    assert (done.returncode, b"the DER writer" in done.stderr) == (code, bool(code)), done.stderr
