"""Certificates: each fault is told in one line and nothing leaves; which ones are taken; forms of files; archives.

Nearly all messages here go from Steve to Steve, so that one certificate is the signer's or the recipient's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import BOB, CAROL, KEY_PASSWORD, STEVE, STEVET, Run, mail
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from faulty import Open, Send, send_by_smtp, start_mailbox  # noqa: F401, the fixtures are used by name
from pki import (
    DAY,
    EMAIL,
    NOW,
    USAGES,
    Authority,
    Identity,
    PrivateKey,
    certificate_der,
    certificate_pem,
    certify,
    distinguished_name,
    key_pem,
)
from readers import Openssl, command, cut_signed

CHECKS = ["validity", "address", "usage", "key_size", "chain"]
SIGN, ENCRYPT = "--sign", "--encrypt"
BOTH = [SIGN, ENCRYPT]
SERVER, ANY = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
FILE, ROOT = f"{STEVE}.crt", "root.pem"
MAIL = mail(To=STEVE)
both_ways = pytest.mark.parametrize("flag", BOTH)

Make = Callable[[Authority, PrivateKey], Identity]


class Fault(NamedTuple):
    """A certificate that one check refuses: the check, what the error says, and how to make it."""

    check: str
    words: str
    make: Make
    flags: Sequence[str] = BOTH
    kind: str = "rsa"


def leaf(**options: Any) -> Make:
    return lambda authority, key: authority.issue(STEVE, key, **options)


def lacking(*usages: str) -> Make:
    return leaf(usages=[usage for usage in USAGES[:5] if usage not in usages])


def untrusted(authority: Authority, key: PrivateKey) -> Identity:
    """Certified by an authority of the same name, which is another."""
    return Authority().issue(STEVE, key)


def alone(authority: Authority, key: PrivateKey) -> Identity:
    """Without the intermediate, which only the root is known to have certified."""
    return replace(authority.issue(STEVE, key), issuers=[])


def below_a_leaf(authority: Authority, key: PrivateKey) -> Identity:
    """Certified by Bob, who is certified but no authority."""
    bob, false = authority.identity(BOB), Authority()
    false.intermediate_key, false.intermediate = bob.key, bob.certificate
    return replace(false.issue(STEVE, key), issuers=[bob.certificate, authority.intermediate])


def day(distance: int) -> str:
    return f"{NOW + distance * DAY:%Y-%m-%d}"


MALLORY, UTF8 = "mallory@example.com", "mällory@example.com"
EXPIRED, FUTURE = leaf(begin=NOW - 300 * DAY, days=200), leaf(begin=NOW + 3 * DAY)
STRANGERS, SERVERS = leaf(san=[MALLORY]), leaf(purposes=[SERVER])
USAGE, CHAIN = r"usage|purpose|emailprotection|not (meant )?for", r"trust|chain|issue|root|CA\b|authority"
FAULTS = {
    "expired": Fault("validity", day(-100), EXPIRED),
    "not yet valid": Fault("validity", day(3), FUTURE),
    "another's address": Fault("address", MALLORY, STRANGERS),
    "another's in the subject": Fault("address", MALLORY, leaf(san=[], subject=[MALLORY]), [SIGN]),
    "another's in UTF-8": Fault("address", UTF8, leaf(san=[], utf8=[UTF8]), [ENCRYPT]),
    "address within another": Fault("address", f"x{STEVE}", leaf(san=[f"x{STEVE}", f"{STEVE}.example"]), [ENCRYPT]),
    "for servers": Fault("usage", USAGE, SERVERS),
    "never signs": Fault("usage", USAGE, lacking("digital_signature", "content_commitment"), [SIGN]),
    "never encrypts": Fault("usage", USAGE, lacking("key_encipherment"), [ENCRYPT]),
    "never agrees": Fault("usage", USAGE, lacking("key_agreement"), [ENCRYPT], "P-256"),
    "RSA of 1024 bits": Fault("key_size", "1024", leaf(), BOTH, "rsa-1024"),
    "RSA of 2047 bits": Fault("key_size", "2047", leaf(), BOTH, "rsa-2047"),
    "untrusted": Fault("chain", CHAIN, untrusted),
    "missing intermediate": Fault("chain", CHAIN, alone),
    "certified by a leaf": Fault("chain", CHAIN, below_a_leaf, [ENCRYPT]),
}


class Desk(NamedTuple):
    """Steve's desk: the folder with key files that the program runs in, and openssl."""

    folder: Path
    authority: Authority
    openssl: Openssl
    run: Run

    def check(self, *words: str, data: bytes = MAIL, **variables: str) -> Any:
        """Run the program with every check, that of the chain included."""
        return self.run("-", "--ca_file", ROOT, *words, data=data, **variables)

    def give(self, make: Make, kind: str = "rsa") -> Identity:
        """Give Steve this certificate."""
        identity = make(self.authority, self.authority.identity(STEVE, kind).key)
        identity.write(self.folder, private=True)
        return identity

    def give_two(self, makes: Sequence[Make], flag: str) -> list[Identity]:
        """Give Steve two certificates in one file: to sign both for his one key, else each for a key of its own."""
        keys = [self.authority.identity(owner).key for owner in (STEVE, STEVE if flag == SIGN else BOB)]
        made = [make(self.authority, key) for make, key in zip(makes, keys, strict=True)]
        (self.folder / FILE).write_bytes(b"".join(identity.chain_pem for identity in made))
        return made

    def put(self, suffix: str, content: bytes, mode: int = 0o600) -> None:
        """Put this file of Steve's in the place of his .pem and .crt."""
        for old in ("pem", "crt"):
            (self.folder / f"{STEVE}.{old}").unlink(missing_ok=True)
        path = self.folder / f"{STEVE}.{suffix}"
        path.write_bytes(content)
        path.chmod(mode)

    def opens(self, entity: bytes, flag: str, used: Identity, *unused: Identity) -> None:
        """Assert that openssl opens the entity with this certificate, and not with the others."""
        if flag == SIGN:
            assert self.signer_of(entity) == used.certificate
            return
        assert b"Hello Steve" in self.openssl.decrypt(entity, used)
        for other in unused:
            with pytest.raises(AssertionError):
                self.openssl.decrypt(entity, other)

    def signer_of(self, entity: bytes) -> x509.Certificate:
        """The certificate that openssl verifies the signature with, whatever else is the matter with it."""
        content, signature, signer = (self.folder / name for name in ("content", "signature", "signer"))
        for path, data in zip((content, signature), cut_signed(entity), strict=True):
            path.write_bytes(data)
        assert b"Hello Steve" in command(
            *("openssl", "cms", "-verify", "-noverify", "-binary", "-inform", "DER", "-in", signature),
            *("-content", content, "-signer", signer),
        )
        return x509.load_pem_x509_certificate(signer.read_bytes())


@pytest.fixture(name="desk")
def prepare(folder: Path, authority: Authority, openssl: Openssl, root: bytes, run: Run) -> Desk:
    (folder / ROOT).write_bytes(root)
    return Desk(folder, authority, openssl, run)


def refused(done: Any, *words: str) -> str:
    """The one line on standard error, with a cure, in which these are found; nothing was printed."""
    assert (done.returncode, done.stdout) == (1, b""), done.stderr
    line: str = done.stderr.decode()
    assert re.fullmatch(r"sparkpostSMIME\.py: (?!warning)[^\n]+ - [^\n]+\n", line), line
    assert [word for word in words if not re.search(word, line, re.IGNORECASE)] == [], line
    return line


def passed(done: Any, *warnings: str) -> bytes:
    """The S/MIME entity printed; standard error has one warning for each of these and nothing else."""
    lines: list[str] = done.stderr.decode().splitlines()
    assert (done.returncode, len(lines)) == (0, len(warnings)), lines
    for word, line in zip(warnings, lines, strict=True):
        assert re.match(rf"sparkpostSMIME\.py: warning: .*{word}", line), line
    output: bytes = done.stdout
    return output[output.index(b"\nContent-Type:") + 1 :]


# ------------------------------------------------------------------------------------------------ faults and skips


@pytest.mark.parametrize(
    ("flag", "fault"),
    [pytest.param(flag, fault, id=f"{name} {flag}") for name, fault in FAULTS.items() for flag in fault.flags],
)
def test_a_fault_is_refused_unless_the_one_check_is_skipped_that_finds_it(flag: str, fault: Fault, desk: Desk) -> None:
    identity = desk.give(fault.make, fault.kind)
    others = ",".join(name for name in CHECKS if name != fault.check)
    line = refused(desk.check(flag), FILE, fault.words)
    assert refused(desk.check(flag, "--skip_checks", others)) == line
    desk.opens(passed(desk.check(flag, "--skip_checks", fault.check), FILE), flag, identity)


@pytest.mark.parametrize("name", ["expired", "another's address", "RSA of 1024 bits", "untrusted"])
def test_nothing_is_sent_to_anyone_where_one_is_at_fault(name: str, desk: Desk, send: Send, open_mailbox: Open) -> None:
    desk.give(FAULTS[name].make, FAULTS[name].kind)
    mailbox = open_mailbox()
    outcome = send(mailbox, mail(To=STEVET, Bcc=STEVE), ENCRYPT, SMIME_CA_FILE=ROOT)
    assert (outcome.code, outcome.out, mailbox.mails) == (1, "", [])
    assert FILE in outcome.err


@both_ways
def test_each_of_two_faults_must_be_skipped(flag: str, desk: Desk) -> None:
    identity = desk.give(leaf(begin=NOW - 300 * DAY, days=200, purposes=[SERVER]))
    assert day(-100) not in refused(desk.check(flag, "--skip_checks", "validity"), USAGE)
    refused(desk.check(flag, "--skip_checks", "usage"), day(-100))
    done = desk.check(flag, "--skip_checks", "usage,validity")
    desk.opens(passed(done, *[FILE] * done.stderr.count(b"\n")), flag, identity)
    assert re.search(rf"{day(-100)}(.|\n)*({USAGE})", done.stderr.decode())


def test_the_faults_of_all_are_told_in_one_line(desk: Desk) -> None:
    desk.give(SERVERS)
    desk.authority.issue(BOB, desk.authority.identity(BOB).key, NOW - 300 * DAY, 200).write(desk.folder)
    (desk.folder / f"{CAROL}.crt").unlink()
    done = desk.check(SIGN, ENCRYPT, data=mail(To=f"{BOB}, {STEVET}", Cc=CAROL))
    assert STEVET not in refused(done, "; ", FILE, USAGE, f"{BOB}.crt", day(-100), f"{CAROL}.crt")


WRONG = [("--skip_checks", names) for names in ("nonsense", "validity,nonsense", "all", "VALIDITY", "")]


@pytest.mark.parametrize("words", [*WRONG, ("--archive", BOB), ("--sign", "--archive", BOB)])
def test_a_wrong_command_line_is_refused(words: Sequence[str], run: Run) -> None:
    done = run("-", *words, data=MAIL)
    assert (done.returncode, done.stdout) == (2, b"")
    assert words[-2].encode() in done.stderr.splitlines()[-1]


def test_the_chain_is_only_checked_where_roots_are_named(desk: Desk) -> None:
    desk.give(untrusted)
    words = ["-", SIGN, ENCRYPT]
    passed(desk.run(*words, data=MAIL))
    refused(desk.run(*words, data=MAIL, SMIME_CA_FILE=ROOT), CHAIN, FILE)
    refused(desk.run(*words, "--ca_file", ROOT, data=MAIL, SMIME_CA_FILE="nowhere.pem"), CHAIN, FILE)


@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_roots_that_cannot_be_read_are_an_error(content: bytes | None, desk: Desk) -> None:
    if content is not None:
        (desk.folder / "bad.pem").write_bytes(content)
    done = desk.run("-", SIGN, "--ca_file", "bad.pem", "--skip_checks", "chain", data=MAIL)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
    assert b"bad.pem" in done.stderr


@pytest.mark.parametrize("suffix", ["pem", "crt", "cer"])
def test_the_key_of_another_certificate_is_never_used(suffix: str, desk: Desk) -> None:
    desk.put("pem", key_pem(desk.authority.identity(BOB).key))
    with (desk.folder / f"{STEVE}.{suffix}").open("ab") as file:
        file.write(desk.authority.identity(STEVE).chain_pem)
    refused(desk.check(SIGN, "--skip_checks", ",".join(CHECKS)), rf"{STEVE}\.(pem|crt|cer)", r"\bkey\b")


# -------------------------------------------------------------------------------------------- what is no fault

GOOD: dict[str, dict[str, Any]] = {  # how the certificate is made, also the address in From and To, and the kind of key
    "SAN only": {},
    "subject only": {"san": [], "subject": [STEVE]},
    "UTF-8": {"address": "jürgen@thetucks.com", "utf8": ["jürgen@thetucks.com"]},
    "international domain": {"address": "steve@müller.example", "san": ["steve@xn--mller-kva.example"]},
    "mixed case": {"san": ["Steve@TheTucks.COM"]},
    "mixed case in the message": {"address": "Steve@TheTucks.COM", "san": [STEVE]},
    "one of several": {"san": ["other@example.com", "junk", f"a@{64 * 'x'}.example", STEVE]},
    "SAN and subject differ": {"san": ["other@example.com"], "subject": [STEVE]},
    "any purpose": {"purposes": [ANY]},
    "several purposes": {"purposes": [SERVER, EMAIL]},
    "no purposes, no usages": {"purposes": [], "usages": []},
    "signs without digitalSignature": {"usages": ["content_commitment", "key_encipherment"]},
    "elliptic curve": {"kind": "P-521"},
    "ends in a while": {"days": 32},
}


@pytest.mark.parametrize("options", GOOD.values(), ids=GOOD)
def test_a_good_certificate_passes_without_a_word(options: dict[str, Any], desk: Desk) -> None:
    how = {"address": STEVE, "kind": "rsa"} | options
    address, key = how.pop("address"), desk.authority.identity(STEVE, how.pop("kind")).key
    identity = desk.authority.issue(address, key, **how)
    identity.write(desk.folder, private=True)
    entity = passed(desk.check(SIGN, ENCRYPT, data=mail(From_=address, To=address)))
    assert desk.signer_of(desk.openssl.decrypt(entity, identity)) == identity.certificate


@both_ways
@pytest.mark.parametrize(
    ("options", "words"), [({"san": []}, "address"), ({"days": 31}, day(30))], ids=["no address", "ends soon"]
)
def test_what_is_odd_is_used_with_a_warning(options: dict[str, Any], words: str, flag: str, desk: Desk) -> None:
    identity = desk.give(leaf(**options))
    done = desk.check(flag)
    desk.opens(passed(done, words), flag, identity)
    assert FILE.encode() in done.stderr


def test_an_intermediate_may_be_limited_to_mail(desk: Desk) -> None:
    limited = Authority(purposes=[EMAIL])
    desk.give(lambda authority, key: limited.issue(STEVE, key))
    (desk.folder / ROOT).write_bytes(certificate_pem(limited.root))
    passed(desk.check(SIGN, ENCRYPT))


@both_ways
def test_critical_policies_are_no_fault(flag: str, desk: Desk) -> None:
    """As some authorities put them into their own certificates and into those that they issue."""
    policies = [x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier("2.5.29.32.0"), None)])]
    root, key = desk.authority, desk.authority.identity(STEVE).key
    issuer_key, name = root.identity(BOB).key, distinguished_name("Issuer with policies")
    issuer = certify(name, issuer_key, root.root.subject, root.root_key, authority=True, more=policies)
    names = [x509.RFC822Name(STEVE)]
    certificate = certify(distinguished_name("Steve"), key, name, issuer_key, names=names, more=policies)
    identity = desk.give(lambda authority, _: Identity(STEVE, key, certificate, authority, [issuer]))
    desk.opens(passed(desk.check(flag)), flag, identity)


# --------------------------------------------------------------------------------------------- which one is taken

OLD, NEW = leaf(begin=NOW - 100 * DAY), leaf(begin=NOW - 10 * DAY)
SEVERAL: dict[str, tuple[list[Make], int]] = {  # the certificates in the file, and which of them is used
    "expired, current": ([EXPIRED, OLD], 1),
    "older, newer": ([OLD, NEW], 1),
    "newer, older": ([NEW, OLD], 0),
    "newer, older that ends later": ([NEW, leaf(begin=NOW - 100 * DAY, days=900)], 0),
    "future, current": ([FUTURE, OLD], 1),
    "another's, own": ([STRANGERS, OLD], 1),
    "for servers, for mail": ([SERVERS, OLD], 1),
    "untrusted, trusted": ([untrusted, OLD], 1),
}


@both_ways
@pytest.mark.parametrize(("makes", "index"), SEVERAL.values(), ids=SEVERAL)
def test_the_usable_certificate_that_began_last_is_used(makes: list[Make], index: int, flag: str, desk: Desk) -> None:
    made = desk.give_two(makes, flag)
    desk.opens(passed(desk.check(flag)), flag, made[index], made[1 - index])


@both_ways
def test_where_none_is_usable_the_fault_of_each_is_told(flag: str, desk: Desk) -> None:
    expired, server = desk.give_two([EXPIRED, SERVERS], flag)
    refused(desk.check(flag), FILE, day(-100), USAGE)
    desk.opens(passed(desk.check(flag, "--skip_checks", "validity"), FILE), flag, expired, server)
    desk.opens(passed(desk.check(flag, "--skip_checks", "usage"), FILE), flag, server, expired)


@both_ways
def test_one_without_a_fault_comes_before_a_newer_one_whose_fault_is_skipped(flag: str, desk: Desk) -> None:
    made = desk.give_two([OLD, FUTURE], flag)
    desk.opens(passed(desk.check(flag, "--skip_checks", "validity")), flag, made[0], made[1])


def test_an_issuer_that_names_an_address_is_not_the_recipient(desk: Desk) -> None:
    key, root_key = (desk.authority.identity(owner).key for owner in (STEVE, BOB))
    name = distinguished_name("Old Root", ["pki@hospital.example"])
    certificate = certify(name, root_key, name, root_key, authority=True, usages=[])
    root = Identity("", root_key, certificate, desk.authority)
    own = Identity(STEVE, key, certify(distinguished_name("Steve"), key, name, root_key), desk.authority)
    (desk.folder / FILE).write_bytes(certificate_pem(own.certificate) + certificate_pem(root.certificate))
    desk.opens(passed(desk.run("-", ENCRYPT, data=MAIL), "address"), ENCRYPT, own, root)


@pytest.mark.parametrize("age", [9, 10, 11], ids=["younger", "of one second", "older"])
@pytest.mark.parametrize("days", [365, 5], ids=["current", "expired"])
@pytest.mark.parametrize("names", [[x509.RFC822Name(STEVE)], []], ids=["both", "it alone"])
def test_an_issuer_that_names_the_recipient_is_not_encrypted_to(
    names: list[x509.GeneralName], days: int, age: int, desk: Desk
) -> None:
    """As openssl req makes one's own CA, with emailAddress in its subject and no key usage."""
    key, root_key = (desk.authority.identity(owner).key for owner in (STEVE, BOB))
    name = distinguished_name("Steve's CA", [STEVE])
    certificate = certify(name, root_key, name, root_key, authority=True, usages=[], begin=NOW - age * DAY)
    own = certify(distinguished_name("Steve"), key, name, root_key, names=names, begin=NOW - 10 * DAY, days=days)
    (desk.folder / FILE).write_bytes(certificate_pem(certificate) + certificate_pem(own))
    done = desk.run("-", ENCRYPT, data=MAIL)
    if days == 5:
        refused(done, FILE, "valid from")
    else:
        root = Identity("", root_key, certificate, desk.authority)
        warnings = [] if names else ["address"]
        desk.opens(passed(done, *warnings), ENCRYPT, Identity(STEVE, key, own, desk.authority), root)


@pytest.mark.parametrize(
    "other",
    [
        leaf(begin=NOW - 300 * DAY, days=200),
        leaf(begin=NOW - 100 * DAY),
        leaf(san=[MALLORY]),
        leaf(begin=NOW - 300 * DAY, days=200, san=[]),
        leaf(begin=NOW - 100 * DAY, san=[]),
        lambda authority, key: replace(authority.issue(STEVE, key), certificate=authority.root),
    ],
    ids=["expired", "older", "another's", "expired, without address", "older, without address", "a root"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_a_certificate_that_certifies_itself_is_the_recipients_own(other: Make, first: int, desk: Desk) -> None:
    """As openssl req -x509 makes it: of an authority, by default."""
    keys = [desk.authority.identity(owner).key for owner in (STEVE, BOB)]
    name = distinguished_name("Steve")
    own = certify(
        name, keys[0], name, keys[0], authority=True, names=[x509.RFC822Name(STEVE)], usages=[], begin=NOW - DAY
    )
    beside = other(desk.authority, keys[1])
    certificates = [own, beside.certificate]
    (desk.folder / FILE).write_bytes(b"".join(map(certificate_pem, certificates[:: 1 - 2 * first])))
    entity = passed(desk.run("-", ENCRYPT, data=MAIL))
    desk.opens(entity, ENCRYPT, Identity(STEVE, keys[0], own, desk.authority))


def test_a_newer_root_is_no_rival_of_the_authority_that_is_ones_own(desk: Desk) -> None:
    (key, root_key), names = (desk.authority.identity(owner).key for owner in (STEVE, BOB)), [x509.RFC822Name(STEVE)]
    name = distinguished_name("Root")
    root = certify(name, root_key, name, root_key, authority=True, names=names, usages=[], begin=NOW - DAY)
    own = certify(distinguished_name("Steve"), key, name, root_key, authority=True, names=names, usages=[])
    (desk.folder / FILE).write_bytes(certificate_pem(own) + certificate_pem(root))
    entity = passed(desk.run("-", ENCRYPT, data=MAIL))
    desk.opens(entity, ENCRYPT, *(Identity(STEVE, k, c, desk.authority) for k, c in ((key, own), (root_key, root))))


# ------------------------------------------------------------------------------------------------- forms of files


@pytest.mark.parametrize(
    ("suffix", "encode"), [("crt", certificate_der), ("cer", certificate_der), ("cer", certificate_pem)]
)
def test_a_certificate_is_in_pem_or_der(suffix: str, encode: Callable[..., bytes], desk: Desk) -> None:
    identity = desk.authority.identity(STEVE)
    desk.put("pem", key_pem(identity.key))
    (desk.folder / f"{STEVE}.{suffix}").write_bytes(encode(identity.certificate))
    entity = passed(desk.run("-", SIGN, ENCRYPT, data=MAIL))
    desk.opens(desk.openssl.decrypt(entity, identity), SIGN, identity)


@pytest.mark.parametrize(("suffix", "password"), [("p12", KEY_PASSWORD), ("pfx", "")])
def test_pkcs12_is_key_certificate_and_chain(suffix: str, password: str, desk: Desk) -> None:
    identity = desk.authority.identity(STEVE)
    desk.put(suffix, identity.pkcs12(password))
    entity = passed(desk.check(SIGN, ENCRYPT, SMIME_KEY_PASSWORD=password))
    assert b"Hello Steve" in desk.openssl.verify(desk.openssl.decrypt(entity, identity))


@both_ways
def test_pkcs12_is_checked_like_other_files(flag: str, desk: Desk) -> None:
    identity = desk.give(EXPIRED)
    desk.put("p12", identity.pkcs12())
    refused(desk.check(flag), f"{STEVE}.p12", day(-100))
    desk.opens(passed(desk.check(flag, "--skip_checks", "validity"), f"{STEVE}.p12"), flag, identity)


@pytest.mark.parametrize(("flag", "suffix"), [(SIGN, "p12"), (ENCRYPT, "pfx")])
@pytest.mark.parametrize(
    ("password", "mode", "words"),
    [("wrong", 0o600, "SMIME_KEY_PASSWORD"), ("", 0o600, "SMIME_KEY_PASSWORD"), (KEY_PASSWORD, 0o640, "chmod 0?600")],
)
def test_pkcs12_needs_its_password_and_to_be_private(
    password: str, mode: int, words: str, suffix: str, flag: str, desk: Desk
) -> None:
    desk.put(suffix, desk.authority.identity(STEVE).pkcs12(KEY_PASSWORD), mode)
    refused(desk.check(flag, SMIME_KEY_PASSWORD=password), rf"{STEVE}\.{suffix}", words)


@pytest.mark.parametrize("days", [365, 5], ids=["its chain", "its successor"])
def test_what_a_lone_certificate_beside_the_key_lacks_is_in_the_other_file(days: int, desk: Desk) -> None:
    current = desk.give(leaf(begin=NOW - 8 * DAY))
    lone = current if days == 365 else desk.authority.issue(STEVE, current.key, NOW - 9 * DAY, days)
    desk.put("pem", key_pem(current.key) + certificate_pem(lone.certificate))
    (desk.folder / FILE).write_bytes(current.chain_pem)
    entity = passed(desk.check(SIGN))
    desk.openssl.verify(entity)
    desk.opens(entity, SIGN, current)


def test_the_file_of_the_faulty_certificate_is_named(desk: Desk) -> None:
    """The other file, in which its chain is, holds nothing that is at fault."""
    expired = desk.authority.issue(STEVE, desk.authority.identity(STEVE).key, NOW - 9 * DAY, 5)
    desk.put("pem", key_pem(expired.key) + certificate_pem(expired.certificate))
    (desk.folder / FILE).write_bytes(certificate_pem(desk.authority.intermediate))
    refused(desk.check(SIGN), rf"{STEVE}\.pem: this certificate", "valid from")


def test_a_file_beside_that_of_the_key_is_not_passed_over_where_it_cannot_be_read(desk: Desk) -> None:
    identity = desk.authority.identity(STEVE)
    desk.put("pem", key_pem(identity.key) + certificate_pem(identity.certificate))
    (desk.folder / FILE).write_bytes(b"junk")
    refused(desk.run("-", SIGN, data=MAIL), FILE, "no certificate can be read")
    (desk.folder / FILE).unlink()
    desk.opens(passed(desk.run("-", SIGN, data=MAIL)), SIGN, identity)


def test_a_request_beside_the_key_is_no_certificate(desk: Desk) -> None:
    identity = desk.authority.identity(STEVE)
    request = x509.CertificateSigningRequestBuilder().subject_name(distinguished_name("Steve"))
    pem = request.sign(identity.key, SHA256()).public_bytes(Encoding.PEM)
    (desk.folder / f"{STEVE}.pem").write_bytes(key_pem(identity.key) + pem)
    desk.opens(passed(desk.check(SIGN)), SIGN, identity)


def test_pkcs12_without_what_is_needed_is_refused(desk: Desk) -> None:
    desk.put("p12", desk.authority.identity(STEVE).pkcs12(private=False))
    refused(desk.check(SIGN), rf"{STEVE}\.p12", r"\bkey\b")
    desk.put("p12", b"junk")
    refused(desk.check(SIGN), rf"{STEVE}\.p12")
    refused(desk.check(ENCRYPT), rf"{STEVE}\.p12")


def test_a_missing_certificate_is_told_with_the_way_to_get_it(desk: Desk) -> None:
    (desk.folder / FILE).unlink()
    for words in ([], ["--archive", STEVE]):
        line = refused(desk.check(ENCRYPT, *words, data=mail(To=STEVET if words else STEVE)), FILE)
        assert re.search("signed (message|mail|e-mail)", line)


# ------------------------------------------------------------------------------------------------------- archives


def test_archives_open_every_copy_but_get_none(desk: Desk, send: Send, open_mailbox: Open) -> None:
    mailbox, bob = open_mailbox(), desk.authority.identity(BOB)
    legal = desk.authority.issue("legal@thetucks.com", desk.authority.identity(STEVE).key)
    legal.write(desk.folder)
    outcome = send(mailbox, mail(Bcc=CAROL), ENCRYPT, "--archive", legal.address, "--archive", BOB)
    assert (outcome.code, outcome.err) == (0, "")
    assert [copy.rcpt_tos for copy in mailbox.mails] == [[STEVET], [CAROL]]
    steve_t, carol = (desk.authority.identity(address) for address in (STEVET, CAROL))
    for copy, own, other in zip(mailbox.mails, (steve_t, carol), (carol, steve_t), strict=True):
        head, _, entity = copy.content.partition(b"\r\nContent-Type:")
        assert not re.search(rb"legal|bob", head)
        for identity in (legal, bob, own):
            desk.opens(b"Content-Type:" + entity, ENCRYPT, identity, other)


@pytest.mark.parametrize("name", ["expired", "another's address", "never encrypts"])
def test_the_certificate_of_an_archive_is_checked(name: str, desk: Desk) -> None:
    identity, words = desk.give(FAULTS[name].make), [ENCRYPT, "--archive", STEVE]
    refused(desk.check(*words, data=mail()), FILE, FAULTS[name].words)
    done = desk.check(*words, "--skip_checks", FAULTS[name].check, data=mail())
    desk.opens(passed(done, FILE), ENCRYPT, identity)
