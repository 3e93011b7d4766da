"""The message: envelope, header and MIME entity, as openssl and Python's e-mail parser read what comes out."""

from __future__ import annotations

import email
import importlib.util
import re
import sys
import time
import urllib.parse
from base64 import b64encode
from collections.abc import Callable
from datetime import datetime, timezone
from email.header import decode_header
from email.message import Message
from email.policy import default
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import BOB, CAROL, SCRIPT, STEVE, STEVET, Run, mail
from hypothesis import given, settings
from hypothesis import strategies as st
from pki import Authority
from readers import Openssl, command, cut_signed, der_of

Flags = tuple[str, ...]
Inner = Callable[..., bytes]
SIGN, OPAQUE, ENCRYPT, BOTH = ("--sign",), ("--sign", "--opaque"), ("--encrypt",), ("--sign", "--encrypt")
SEALED: list[Flags] = [SIGN, OPAQUE, ENCRYPT, BOTH]
ALL: list[Flags] = [(), *SEALED]
OLD = "Mon, 01 Jan 2024 00:00:00 +0000"
E = "é".encode()
PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=200)

# ------------------------------------------- the names inside of the script that these tests know: all are here

spec = importlib.util.spec_from_file_location("script", SCRIPT)
assert spec is not None and spec.loader is not None
sys.modules["script"] = script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def prepare(entity: bytes, *, clear: bool) -> bytes:
    fields, _, body = script.split_entity(entity)
    return bytes(script.make_entity(fields, body, clear=clear))


def sign(entity: bytes, keys: Path, *, opaque: bool) -> bytes:
    options = script.parse_args(["-", "--keys", str(keys)])
    keyring = script.Keyring(options, script.read_settings({}, options))
    return bytes(script.sign(entity, keyring.load_signer(STEVE), opaque=opaque, pss=False))


def outer_fields(header: bytes, *flags: str) -> list[bytes]:
    fields, _, _ = script.split_entity(header + b"\r\n")
    return list(script.outer_fields(fields, script.parse_args(["-", *flags]), domain="x.org"))


def recipients(header: str) -> list[str]:
    envelope = script.read_envelope(script.split_entity(f"From: a@x.org\r\n{header}\r\n".encode())[0], None)
    return [*envelope.recipients, *envelope.hidden]


# --------------------------------------------------------------- asking the program, and reading what it made


def printed(run: Run, data: bytes, *flags: str) -> bytes:
    done = run("-", *flags, data=data)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(run: Run, data: bytes, *flags: str) -> str:
    """The one line that tells why nothing was printed."""
    done = run("-", *flags, data=data)
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rb"sparkpostSMIME\.py: [^\n]+\n", done.stderr)
    return done.stderr.decode().lower()


@pytest.fixture
def inner(run: Run, openssl: Openssl, authority: Authority) -> Inner:
    """The entity in what the program makes with these flags, as openssl decrypts and verifies it."""

    def inner(data: bytes, *flags: str) -> bytes:
        output = printed(run, data, *flags)
        entity = output[output.index(b"Content-Type:") :]
        entity = openssl.decrypt(entity, authority.identity(STEVET)) if "--encrypt" in flags else entity
        return openssl.verify(entity) if "--sign" in flags else entity

    return inner


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Path:
    """Key files for what runs in this process; an elliptic curve signs faster."""
    folder = tmp_path_factory.mktemp("keys")
    authority.identity(STEVE, "P-256").write(folder, private=True)
    authority.identity(STEVET).write(folder)
    return folder


def header_of(message: bytes) -> list[bytes]:
    return re.split(rb"\r\n(?![ \t])", message.partition(b"\r\n\r\n")[0])


def values(message: bytes, name: str) -> list[str]:
    return list(email.message_from_bytes(message).get_all(name, []))


def shown(field: bytes) -> str:
    """An unstructured field as a mail program shows it (RFC 2047)."""
    text = field.partition(b":")[2].replace(b"\r\n", b"").decode("ascii").strip()
    words = [(word.encode() if isinstance(word, str) else word, charset) for word, charset in decode_header(text)]
    return "".join(word.decode(charset or "ascii") for word, charset in words)


def is_fit(data: bytes, *, clear: bool) -> bool:
    """RFC 8551 section 3.1, for data that has line ends of CRLF."""
    lines = data.split(b"\r\n")
    altered = any(line.startswith(b"From ") or line.endswith((b" ", b"\t")) for line in lines)
    plain = data.isascii() and not any(len(line) > 998 or re.search(rb"[\0\r\n]", line) for line in lines)
    return plain and not (clear and altered)


def encoding(part: Message) -> str:
    return str(part["Content-Transfer-Encoding"] or "7bit").strip().lower()


def parts(entity: bytes) -> list[Message]:
    """All parts, outermost first. Line ends are CRLF, but binary data has none."""
    found = list(email.message_from_string(entity.decode("latin-1")).walk())
    for part in found:
        if "Content-Transfer-Encoding" in part:  # older Pythons do not understand a folded one
            part.replace_header("Content-Transfer-Encoding", encoding(part))
        if not part.is_multipart() and (encoding(part) != "binary" or part.get_content_maintype() == "text"):
            part.set_payload(re.sub("\r?\n", "\r\n", str(part.get_payload())))
    return found


def skeleton(part: Message) -> tuple[object, ...]:
    """Type, parameters, number of parts; and of a leaf what it decodes to."""
    below = len(part.get_payload()) if part.is_multipart() else part.get_payload(decode=True)
    return part.get_content_type(), part.get_params(), below


def contents(entity: bytes) -> list[bytes]:
    return [bytes(part.get_payload(decode=True)) for part in parts(entity) if not part.is_multipart()]


def multipart(*entities: bytes, kind: bytes = b"mixed", boundary: bytes = b"=b") -> bytes:
    inside = b"".join(b"--%b\r\n%b\r\n" % (boundary, entity) for entity in entities)
    return b'Content-Type: multipart/%b; boundary="%b"\r\n\r\n%b--%b--\r\n' % (kind, boundary, inside, boundary)


def message(entity: bytes) -> bytes:
    return mail().partition(b"\r\n\r\n")[0] + b"\r\n" + entity


# --------------------------------------------------------------------------------------------------- envelope

LISTS = {
    "To: a@x.org, B <b@x.org>": "a b",
    "To: b@x.org\r\nBcc: a@x.org\r\ncc:\tc@x.org\r\nTO: d@x.org": "b d c a",
    "To: a@x.org, b@x.org\r\nCc: A <a@X.org>, c@x.org\r\nBcc: b@x.org": "a b c",
    "To: a@x.org\r\nRESENT-TO: z@x.org\r\nResent-Cc: y@x.org\r\nResent-Bcc: w@x.org": "a",
    "To: Team: a@x.org, B <b@x.org>;, c@x.org\r\nCc: undisclosed-recipients:;": "a b c",
    "To: [Help: tier 2] <a@x.org>, [b, c]: b@x.org;": "a b",
    "To: a@x.org (A (nested (twice), z@x.org) \\) end), (B) b@x.org": "a b",
    'To: "G@h.org": a@x.org;, b@x.org': "a b",
    'To: a@x.org (5" disk), b@x.org (3" disk)': "a b",
    'To: "Doe, J. <z@x.org>" <a@x.org>, "\\"; z@x.org" <b@x.org>': "a b",
    "To: =?utf-8?Q?J=C3=BCrgen=2C_z=40x.org?= <a@x.org>, =?utf-8?B?w6k=?= <b@x.org>": "a b",
    "To: Jürgen <a@x.org>, Ω\r\n <b@x.org>,\r\n\tc@x.org": "a b c",
    "To: pete(his account)@x.org, <pat @ x.org>, paul@ (home) x.org": "pete pat paul",
    "To: , <@y.org,@z.org:a@x.org>,, b@x.org,": "a b",
    "To: a@x.org, A@x.org": "a a",  # whose case a server may heed
}
BAD = "bob|bob@|@x.org|<>|a@x.org b@x.org|<a@x.org> <b@x.org>|a@x.org, Bob <bob>|a@b@x.org|a@x.org: b@x.org;"
BAD += "|[a@x.org, c@x.org]: b@x.org;"
BAD += '|a(x)b@x.org|a@x.org, "open|a@x.org (open|<a\r\n b@x.org>|a\rb@x.org|a\0b@x.org|"\r"@x.org|a@x\x7f.org'
REFUSED: list[tuple[str, dict[str, Any]]] = [("the to field", {"To": to, "Cc": STEVET}) for to in BAD.split("|")]
BAD_SENDERS = ["Steve", "a\0@x.org", f"{STEVE}, {BOB}", f"{BOB}\r\nFrom: {STEVE}"]
REFUSED += [("no recipient", {"To": to, "Resent_To": BOB}) for to in (None, "undisclosed-recipients:;", ",(a@x.org)")]
REFUSED += [("the from field", {"From_": sender}) for sender in BAD_SENDERS]
REFUSED += [
    ("no sender", {"From_": None}),
    ("first blank line", {"From_": None}),
    ("no sender", {"From_": "G:;"}),
    ("the sender field", {"Sender": "Steve"}),
]


@pytest.mark.parametrize(("header", "expected"), LISTS.items())
def test_recipients_are_all_of_to_cc_and_bcc_once_and_in_order(run: Run, header: str, expected: str) -> None:
    data = f"From: {STEVE}\r\n{header}\r\n\r\n".encode()
    done = run("-", "--encrypt", "--send_smtp", data=data, SMTP_HOST="127.0.0.1", SMTP_PORT="1")
    assert done.returncode == 1
    assert re.findall(r"([^\s/]+)@x\.org\.crt not found", done.stderr.decode().lower()) == expected.split()


def test_an_encrypted_message_is_for_each_recipient_once(run: Run, openssl: Openssl, authority: Authority) -> None:
    output = printed(run, mail(To=f'"B, C" <{BOB}>, {STEVET}', Cc=f"{BOB}, {STEVET} (again)", Bcc=CAROL), "--encrypt")
    listing = command("openssl", "cms", "-cmsout", "-print", "-noout", "-inform", "DER", data=der_of(output))
    serials = [int(serial, 0) for serial in re.findall(rb"serialNumber: (\w+)", listing)]
    assert sorted(serials) == sorted(authority.identity(name).certificate.serial_number for name in (BOB, STEVET))
    assert openssl.decrypt(output, authority.identity(BOB)) == openssl.decrypt(output, authority.identity(STEVET))


@pytest.mark.parametrize(("told", "fields"), REFUSED)
def test_what_names_no_clear_envelope_is_refused(run: Run, told: str, fields: dict[str, Any]) -> None:
    assert told in refusal(run, mail(**fields))


@pytest.mark.parametrize("address", ["a@x.org\r\nRCPT TO:<b@x.org>", "a@x.org\n", "a@x.org, b@x.org", "Steve"])
def test_a_return_path_that_is_no_address_is_refused(run: Run, address: str) -> None:
    assert "--return_path" in refusal(run, mail(), "--return_path", address)


def test_several_authors_need_a_sender(run: Run) -> None:
    output = printed(run, mail(From_=f"{STEVE}, {BOB}", Sender=f"Steve <{STEVE}>"), "--sign")
    assert values(output, "From") == [f"{STEVE}, {BOB}"]


# ----------------------------------------------------------------------------------------------------- header


@pytest.mark.parametrize("flags", ALL)
def test_header_fields_stay_as_they_are_and_in_order(run: Run, flags: Flags) -> None:
    kept = [b"Received: from a\r\n\tby b;\r\n    then", b"X-one:no blank", b"DATE:  1 Jan 2024 00:00:00 +0000 (UTC) "]
    kept += [b"from\t: Steve <steve@thetucks.com>", b"X-Empty:", b"To:\t" + STEVET.encode() + b",\r\n\t", b"X-one: 2"]
    kept += [b"Subject: =?utf-8?Q?a?=  \"b\" 'c'\t<d>", b"MESSAGE-ID: <1@x>", b"X-998: " + b"x y" * 330 + b"z"]
    kept += [b"MIME-version: 1.0 (by hand)", b"Contents: here", b"Resent-To: nobody"]
    gone = [b"Bcc: " + CAROL.encode(), b"bcc:\r\n " + BOB.encode(), b"Resent-BCC: x", b"Return-Path: <x@y>"]
    gone += [b"Content-Length: 99", b"mime-version: 1.0"]
    mbox = b"From steve@thetucks.com Mon Jan  1 00:00:00 2024"
    (gone if flags else kept).append(b"dkim-SIGNATURE: v=1; b=abc")
    header = header_of(printed(run, b"\r\n".join([mbox, *kept, *gone, b"", b"Hello\r\n"]), *flags))
    assert [field for field in header if not field.startswith(b"Content-")] == kept


@pytest.mark.parametrize("flags", SEALED)
def test_content_fields_move_into_the_entity(run: Run, inner: Inner, flags: Flags) -> None:
    moved = [b"CONTENT-TYPE: text/html;\r\n charset=us-ascii", b"content-language:\r\n\tde", b"Content-X: y"]
    data = b"\r\n".join([moved[0], b"Content-Length: 9", mail().partition(b"\r\n\r\n")[0], *moved[1:], b"", b"<p>\r\n"])
    output = printed(run, data, *flags)
    assert [len(values(output, f"Content-{name}")) for name in ("Type", "Language", "X", "Length")] == [1, 0, 0, 0]
    assert inner(data, *flags) == b"\r\n".join([*moved, b"", b"<p>\r\n"])


def test_a_from_field_with_a_blank_before_the_colon_is_no_mbox_line(run: Run) -> None:
    assert printed(run, mail().replace(b"From:", b"From :")).startswith(b"From : Steve <")


def test_date_and_message_id_are_added_where_missing_and_date_now_replaces(run: Run) -> None:
    assert re.fullmatch(r"<[^@\s<>]+@thetucks\.com>", values(printed(run, mail()), "Message-ID")[0])
    for output in (printed(run, mail()), printed(run, mail(Date=OLD, X_Last="1"), "--date_now")):
        assert header_of(output)[3].startswith(b"Date: ")
        (date,) = values(output, "Date")
        distance = parsedate_to_datetime(date.replace("-0000", "+0000")) - datetime.now(timezone.utc)
        assert abs(distance.total_seconds()) < 60


STALE = [(OLD, True), ("today", True), (formatdate(), False), (None, False)]
STALE += [(formatdate(time.time() + 4200), True), (formatdate(time.time() - 3000), False)]


@pytest.mark.parametrize("flags", [*ALL, ("--sign", "--date_now")])
@pytest.mark.parametrize(
    ("date", "stale"), STALE, ids=["old", "unreadable", "now", "none", "70 minutes to come", "50 minutes old"]
)
def test_a_stale_date_is_told_when_signing(run: Run, date: str, stale: bool, flags: Flags) -> None:
    done = run("-", *flags, data=mail(Date=date), TZ="EST5")
    told = stale and "--sign" in flags and "--date_now" not in flags
    assert (done.returncode, b"--date_now" in done.stderr, done.stderr.count(b"\n")) == (0, told, told)


NAMES = ["X-A", "Subject", "RECEIVED", "To", "from", "bCC", "Resent-BCC", "return-Path", "CONTENT-length", "Contents"]
NAMES += ["Content-Foo", "DKIM-signature", "Mime-Version", "Date", "message-ID"]
LINES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
VALUES = st.lists(LINES, min_size=1, max_size=3).map(lambda lines: ".\r\n\t".join(lines))


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from(NAMES), VALUES)), st.sampled_from(ALL))
def test_no_field_changes_but_the_named_ones(fields: list[tuple[str, str]], flags: Flags) -> None:
    dropped = {"bCC", "Resent-BCC", "return-Path", "CONTENT-length"}
    dropped |= {"DKIM-signature", "Content-Foo"} if flags else set()
    expected: dict[str, bytes] = {}
    for name, value in fields:
        if name not in dropped:
            key = name if name == "Mime-Version" else f"{name} {len(expected)}"
            expected.setdefault(key, f"{name}:{value}".encode())
    outer = outer_fields("".join(f"{name}:{value}\r\n" for name, value in fields).encode(), *flags)
    assert outer[: len(expected)] == list(expected.values())
    added = {field.split(b":")[0].lower().decode() for field in outer[len(expected) :]}
    assert added == {"date", "message-id", "mime-version"} - {name.lower() for name, _ in fields}


RAW_TEXT = {
    "Grüße, (Jürgen) €".encode(): "Grüße, (Jürgen) €",
    b"Gr\xfc\xdfe": "Grüße",
    b"=?utf-8?Q?a?= %b =?utf-8?Q?b?= c" % E: "a é b c",
    b"=?utf-8?Q?a?=\r\n %b\r\n %b" % (E, E): "a é é",
    b"%b  %b" % (E, E): "é  é",
    b"=?utf-8?Q?%b=C3=A9_?= b" % E: "éé  b",
    b"=?iso-8859-1?q?\xe9=E9?=": "éé",
    b"a ?= %b =? b" % E: "a ?= é =? b",
    b"word " + E * 300: "word " + "é" * 300,
}
RAW_NAMES = {
    "Jürgen Müller <@>": ["Jürgen Müller"],
    '"Müller, \\"J\\" Jürgen" <@>': ['Müller, "J" Jürgen'],
    'Müller<@>, "Jürgen"<@>': ["Müller", "Jürgen"],
    "@ (Jürgen \\) Müller), Bob <@>": ["", "Bob"],
    "Bücher: é <@>, e <@>;": ["é", "e"],
    "Jürgen@Home <@>": ["Jürgen@Home"],
}


@pytest.mark.parametrize(("value", "text"), RAW_TEXT.items())
def test_raw_text_is_shown_the_same_as_encoded_words(run: Run, value: bytes, text: str) -> None:
    output = printed(run, b"X-Raw: " + value + b"\r\n" + mail())
    assert output.isascii()
    assert shown(header_of(output)[0]) == text


@pytest.mark.parametrize("charset", ["utf-8", "latin-1"])
@pytest.mark.parametrize(("to", "names"), RAW_NAMES.items())
def test_raw_names_become_words_and_addresses_stay(run: Run, to: str, names: list[str], charset: str) -> None:
    header = to.replace("<@>", f"<{STEVET}>").replace("@ (", f"{STEVET} (").encode(charset)
    output = printed(run, b"From: " + STEVE.encode() + b"\r\nTo: " + header + b"\r\n\r\n")
    assert output.isascii()
    field = email.message_from_bytes(output, policy=default)["To"]
    assert [(a.display_name, a.addr_spec) for a in field.addresses] == [(name, STEVET) for name in names]
    for token in re.split(r"[\s()]+", values(output, "To")[0]):  # RFC 2047 section 5: nothing touches a word
        assert "?=" not in token or re.fullmatch(r"=\?[\w-]+\?[BQbq]\?[^?]*\?=", token)


@pytest.mark.parametrize("end", [b"", b"   "])
def test_a_long_field_is_folded_at_white_space(run: Run, end: bytes) -> None:
    field = b"X-Long:" + b" word, another\tword" * 200 + end
    folded = header_of(printed(run, field + b"\r\n" + mail()))[0]
    assert folded.replace(b"\r\n", b"") == field
    assert all(len(line) <= 998 and line.strip() for line in folded.split(b"\r\n"))


@PROPERTY
@given(st.text('abé ü€😀\t"(),.=_', min_size=1, max_size=80), st.sampled_from(["utf-8", "latin-1"]))
def test_any_raw_subject_is_shown_the_same(text: str, charset: str) -> None:
    value = text.encode(charset, "replace")
    field = outer_fields(b"Subject: " + value + b"\r\n")[0]
    assert field.isascii()
    assert shown(field) == value.decode(charset).strip()


def test_a_control_character_in_a_header_field_becomes_a_blank() -> None:
    assert outer_fields(b"Subject: a\0b\r\n")[0] == b"Subject: a b"


def test_a_long_list_of_addresses_is_folded_after_commas(run: Run) -> None:
    names = [f'"Doe, {number}" <u{number}@thetucks.com>' for number in range(200)]
    field = f"To: {','.join(names)}".encode()
    folded = header_of(printed(run, mail(To=None).replace(b"Subject:", field + b"\r\nSubject:")))[1]
    assert folded.replace(b"\r\n", b"").replace(b">, ", b">,") == field
    assert max(map(len, folded.split(b"\r\n"))) <= 998


@pytest.mark.parametrize("length", range(990, 1003))
def test_a_folded_line_has_998_bytes_at_most(length: int) -> None:
    field = outer_fields(b"X-A: " + b"a" * (length - 5) + b" " + b"b" * 20 + b"\r\n")[0]
    assert max(map(len, field.split(b"\r\n"))) <= 998
    assert field.replace(b"\r\n", b"").endswith(b"a " + b"b" * 20)


def test_what_comes_after_a_word_too_long_for_any_line_is_folded() -> None:
    field = b"References: <" + b"a" * 1200 + b"> " + b"<b@x.org> " * 120 + b"c"
    folded = script.fold(field)
    assert folded.replace(b"\r\n", b"") == field
    assert [len(line) > 998 for line in folded.split(b"\r\n")] == [False, True, False, False]


# ----------------------------------------------------------------------------------------------------- entity

TEXT, DATA = b"Content-Type: text/plain\r\n\r\n", b"Content-type:application/x-data\r\n\r\n"
RFC822 = b"Content-Type: message/rfc822\r\n\r\n"
DOUBLE = ": 7bit\r\nContent-Transfer-Encoding: 8bit"
UNFIT = {"raw": b"caf" + E, "long": b"x" * 999, "NUL": b"a\0b", "CR": b"a\rb"}
ALTERED = {"From": b"a\r\nFrom me", "blank": b"a \r\nb", "tab at the end": b"a\t"}
SIGNED = multipart(TEXT + b"%b", DATA + b"AAAA", kind=b'signed; protocol="application/pkcs7-signature"', boundary=b"s")
BROKEN = [b"multipart/mixed; boundary=none", b"multipart/mixed", b"message/partial; id=x"]
ODD = [b"*=idna''=b", b"*=punycode''%FF", b"*=undefined''x", b"*=a\0b''x", b"*" + b"9" * 5000 + b"=x"]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("flags", ALL)
def test_line_ends_of_the_output_are_those_of_the_input(run: Run, flags: Flags, line_end: bytes) -> None:
    output = printed(run, mail(b"a\r\n\r\nb\r\n").replace(b"\r\n", line_end), *flags)
    assert set(re.findall(rb"\r?\n|\r", output)) == {line_end}


def test_without_flags_the_body_stays_and_content_fields_stay_outside(run: Run) -> None:
    body = b"From me \r\nFrom: you\r\n" + bytes(range(256)).replace(b"\n", b"") + b"x" * 2000 + b"\r\n\r\n"
    output = printed(run, mail(body, Content_Type="text/html", content_X="y", Bcc=BOB))
    assert output.endswith(b"\r\n\r\n" + body)
    assert values(output, "Content-Type") + values(output, "Content-X") == ["text/html", "y"]
    assert BOB.encode() not in output


@pytest.mark.parametrize("flags", SEALED)
def test_what_is_fit_is_carried_byte_for_byte(inner: Inner, flags: Flags) -> None:
    leaf = b"CONTENT-type : TEXT/html\r\n\r\n=20 >From me\r\n.\r\n%b\r\n\r\nContent-Transfer-Encoding: 8bit" % (
        b"x" * 998
    )
    entity = multipart(leaf, b"", b"\r\n").replace(b"\r\n--", b"\r\npreamble\r\n--", 1) + b"epilogue"
    assert inner(message(entity).replace(b"\r\n", b"\n"), *flags) == entity


@pytest.mark.parametrize("flags", SEALED)
@pytest.mark.parametrize("fault", [*UNFIT, *ALTERED])
def test_only_the_leaf_at_fault_is_encoded(inner: Inner, fault: str, flags: Flags) -> None:
    body = (UNFIT | ALTERED)[fault]
    fit = b"content-type: text/x;\r\n\ta=b\r\n\r\n=41 stays\r\n"
    entity = multipart(fit, multipart(TEXT + body, DATA + body, boundary=b"=b2"))
    made = inner(message(entity), *flags)
    if fault in ALTERED and flags in (OPAQUE, ENCRYPT):
        assert made == entity
    else:
        assert is_fit(made, clear=flags in (SIGN, BOTH))
        assert b"--=b\r\n" + fit + b"\r\n--=b\r\n" in made
        assert contents(made) == [b"=41 stays\r\n", body, body]
        assert [encoding(part) for part in parts(made)] == ["7bit"] * 3 + ["quoted-printable", "base64"]


def test_quoted_printable_breaks_long_lines_alone(inner: Inner) -> None:
    short = b"A short line\r\n\r\nx\r\n" + b"y" * 75 + b"\r\n"
    made = inner(message(TEXT + short + (E + b"\r\n") * 2 + b"z" * 77), "--sign").partition(b"\r\n\r\n")[2]
    assert made.startswith(short + b"=C3=A9\r\n" * 2 + b"z")
    assert [len(line) <= 76 for line in made.split(b"\r\n")] == [True] * 8


@pytest.mark.parametrize(
    "label", [":8bit", ": BINARY", ":\r\n 8Bit", " : 8bit", ": (really) 8bit", ": 8bit; x=y", DOUBLE]
)
@pytest.mark.parametrize("flags", [SIGN, ENCRYPT])
def test_ascii_called_eight_bit_becomes_seven_bit(inner: Inner, label: str, flags: Flags) -> None:
    text = b"Content-Transfer-Encoding" + label.encode() + b"\r\n" + TEXT + b"ASCII\r\n"
    made = inner(message(multipart(text, RFC822 + text)), *flags)
    assert not re.search(rb"8bit|binary", made, re.IGNORECASE)
    assert contents(made) == [b"ASCII\r\n"] * 2


def test_binary_data_stays_the_same_bytes(inner: Inner) -> None:
    leaf = b"Content-Transfer-Encoding: Binary\r\nContent-Type: image/png\r\n\r\n"
    data = bytes(range(256)) + b"\n\r\n\r\r\n \n"
    assert contents(inner(message(multipart(leaf + data, leaf + b"a\nb")), "--sign")) == [data, b"a\nb"]


@pytest.mark.parametrize("flags", [SIGN, BOTH])
def test_a_message_in_a_message_is_never_encoded_itself(inner: Inner, flags: Flags) -> None:
    letter = "Subject: Grüße\r\nContent-Type: text/plain; charset=utf-8\r\n\r\né\r\n".encode()
    eight = b"Content-Transfer-Encoding: 8bit\r\n"
    digest = multipart(b"\r\n" + letter, eight + b"\r\n" + letter, kind=b"digest", boundary=b"=d")
    made = inner(message(eight + multipart(eight + RFC822 + letter, digest)), *flags)
    outer = [part for part in parts(made) if part.is_multipart()]
    assert is_fit(made, clear=True)
    assert contents(made) == [E + b"\r\n"] * 3
    assert [encoding(part) for part in outer] == ["7bit"] * 5
    assert " ".join(part.get_content_subtype() for part in outer) == "mixed rfc822 digest rfc822 rfc822"
    assert [shown(b":" + part["Subject"].encode()) for part in parts(made) if part["Subject"]] == ["Grüße"] * 3


@pytest.mark.parametrize("entity", [RFC822 + b"To: " + E + b"@x.org\r\n\r\n", TEXT[:-4] + b";name=" + b"a" * 1200])
def test_a_header_within_that_cannot_be_made_fit_is_refused(run: Run, entity: bytes) -> None:
    done = run("-", "--sign", data=message(entity))
    assert done.returncode == 1 or is_fit(done.stdout[done.stdout.index(b"Content-") :], clear=True)


@pytest.mark.parametrize("text", [b"A text", b"Quoting Content-Transfer-Encoding: 8bit"])
def test_a_signed_part_is_carried_unaltered(inner: Inner, text: bytes) -> None:
    made = inner(message(multipart(SIGNED % text, TEXT + UNFIT["raw"])), "--sign")
    assert b"--=b\r\n" + SIGNED % text + b"\r\n--=b\r\n" in made
    assert is_fit(made, clear=True)


@pytest.mark.parametrize("text", [*UNFIT.values(), *ALTERED.values()])
def test_an_unfit_signed_part_asks_for_opaque(run: Run, inner: Inner, text: bytes) -> None:
    data = message(multipart(SIGNED % text, TEXT + UNFIT["raw"]))
    assert "--opaque" in refusal(run, data, "--sign")
    for flags in (OPAQUE, ENCRYPT):
        made = inner(data, *flags)
        assert b"--=b\r\n" + SIGNED % text + b"\r\n--=b\r\n" in made
        assert encoding(parts(made)[-1]) == "quoted-printable"


@pytest.mark.parametrize(("body", "charset"), [(b"a\r\n", "ascii"), (E, "utf-8"), (b"\xe9", "latin-1")])
def test_without_a_content_type_it_is_plain_text(inner: Inner, body: bytes, charset: str) -> None:
    (part,) = parts(inner(mail(body), "--sign"))
    assert part.get_content_type() == "text/plain"
    assert bytes(part.get_payload(decode=True)).decode(part.get_content_charset("ascii")) == body.decode(charset)


@pytest.mark.parametrize("charset", ["utf-8", "latin-1"])
def test_a_raw_file_name_keeps_its_bytes_and_claims_no_charset(inner: Inner, charset: str) -> None:
    field = 'Content-Disposition: attachment; filename="Grüße; 1.pdf"; size=1\r\n'.encode(charset)
    (part,) = parts(inner(message(field + DATA + b"x"), "--sign"))
    disposition = str(part["Content-Disposition"])
    (encoded,) = re.findall(r"filename\*=([\w%.-]+)", disposition)
    assert urllib.parse.unquote_to_bytes(encoded) == "Grüße; 1.pdf".encode(charset)
    assert part.get_param("size", header="Content-Disposition") == "1"


@pytest.mark.parametrize("kind", BROKEN)
def test_the_text_of_a_broken_part_is_kept_or_refused(run: Run, inner: Inner, kind: bytes) -> None:
    data = message(b"Content-Type: " + kind + b"\r\n\r\nX: y\r\n\r\n" + E)
    if run("-", "--sign", data=data).returncode == 0:
        assert any(E in content for content in contents(inner(data, "--sign")))
    else:
        assert refusal(run, data, "--sign")


@pytest.mark.parametrize("boundary", ODD, ids=range(len(ODD)))
def test_odd_boundary_parameters_give_no_traceback(run: Run, boundary: bytes) -> None:
    data = message(multipart(TEXT + UNFIT["raw"]).replace(b'="=b"', boundary))
    assert run("-", "--sign", data=data).returncode in (0, 1)


def test_parts_in_parts_without_end_are_refused(run: Run) -> None:
    entity = TEXT + UNFIT["raw"]
    for level in range(200):
        entity = multipart(entity, boundary=b"=%d" % level)
    assert "deep" in refusal(run, message(entity), "--sign")


def test_the_boundary_does_not_occur_in_the_entity(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [bytes(16), b"\1" * 16]
    entity = TEXT + b"------=_" + drawn[0].hex().encode() + b"\r\n"
    monkeypatch.setattr("os.urandom", lambda size: drawn.pop(0))
    assert cut_signed(sign(entity, keys, opaque=False))[0] == entity


CHUNKS = b"text|\n|\r\n| |\t|From |\nFrom me| \r\n|\r|\0|\xe9|=|=20|=\n|=e9|.|--|\x7f|A: c\n".split(b"|")
CHUNKS += [E, b"x" * 999, b"\nContent-Transfer-Encoding: 8bit\n"]
CONTENTS = st.binary(max_size=30) | st.lists(st.sampled_from(CHUNKS), max_size=8).map(b"".join)
LABELS = ["", ":7bit", ": 8bit", ": 8BIT ", ":\n binary", ": Binary", ":\n\tquoted-printable", ": BASE64", ":base64"]
TYPES = ["text/plain", 'TEXT/Html;\n\tcharset="x;y"', "application/x-data ; a=b", "image/png"]
MULTIPART = [b'content-TYPE:\n multipart/%b; BOUNDARY="%b"\n\n', b"Content-type: multipart/%b;boundary=%b\n\n"]
STARTS, ENDS = [b"", b"preamble\n", b"From \xe9\n"], [b"--%b--", b"--%b-- \n", b"--%b--\n \xe9", b"%.0b"]
EXTRA = [b"", b"X-A:  b \n", b"Content-ID: <a>\n", b"X-B: " + b"y " * 600 + b"\n"]


@st.composite
def leaves(draw: st.DrawFn, typed: bool) -> bytes:
    kind, label, body = draw(st.sampled_from(TYPES)), draw(st.sampled_from(LABELS)), draw(CONTENTS)
    if "base64" in label.lower():
        body = draw(st.sampled_from([b"", b"\n", b" \n", b"\n!\xe9"])).join([b64encode(body[:9]), b64encode(body[9:])])
    head = draw(st.sampled_from([f"Content-Type:{kind}\n", f"CONTENT-type: {kind} \n", *([] if typed else [""])]))
    return (head + (label and f"Content-transfer-ENCODING{label}\n")).encode() + b"\n" + body


@st.composite
def multiparts(draw: st.DrawFn, depth: int) -> bytes:
    """Only those within others may lack the last boundary; the boundary of others begins theirs."""
    kind, boundary = draw(st.sampled_from([b"mixed", b"alternative", b"digest"])), b"b" * (depth + 1)
    inside = [draw(entities(depth + 1, kind == b"digest")) for _ in range(draw(st.integers(1, 3)))]
    if kind == b"digest" and draw(st.booleans()):
        inside = [b"\nSubject: x\n" + entity for entity in inside]
    pieces = [b"--" + boundary + draw(st.sampled_from([b"\n", b" \r\n"])) + entity + b"\n" for entity in inside]
    start, end = draw(st.sampled_from(STARTS)), draw(st.sampled_from(ENDS[: 3 + (depth > 0)]))
    return draw(st.sampled_from(MULTIPART)) % (kind, boundary) + b"".join([start, *pieces, end % boundary])


@st.composite
def entities(draw: st.DrawFn, depth: int = 0, typed: bool = True) -> bytes:
    """A MIME tree in one or other spelling, with line ends of both kinds, fit for transport or not."""
    kind = draw(st.sampled_from(["leaf", "multipart", "message"][: (2, 3, 3, 1)[depth]]))
    if kind == "message":
        entity = b"Content-Type: Message/RFC822\n\nSubject: \xe9\n" + draw(entities(depth + 1, False))
    else:
        entity = draw(leaves(typed) if kind == "leaf" else multiparts(depth))
    head, blank, body = (draw(st.sampled_from(EXTRA)) + entity).partition(b"\n\n")
    return (head + blank).replace(b"\n", draw(st.sampled_from([b"\n", b"\r\n"]))) + body


def assert_same(before: bytes, after: bytes, *, clear: bool) -> None:
    """Every part is the same; and where it is a leaf without fault, even its encoding."""
    old, new = parts(before), parts(after)
    assert [skeleton(part) for part in new] == [skeleton(part) for part in old]
    for was, now in zip(old, new, strict=True):
        payload = str(was.get_payload())
        if not was.is_multipart() and encoding(was) != "binary" and is_fit(payload.encode("latin-1"), clear=clear):
            assert now.get_payload() == payload
            assert encoding(now) == encoding(was).replace("8bit", "7bit")
        assert encoding(now) in ("7bit", "quoted-printable", "base64")


@PROPERTY
@given(entities(), st.booleans())
def test_any_entity_is_made_fit_and_decodes_to_the_same_parts(entity: bytes, clear: bool) -> None:
    made = prepare(entity, clear=clear)
    assert is_fit(made, clear=clear)
    assert_same(entity, made, clear=clear)
    assert prepare(made, clear=clear) == made


@PROPERTY
@given(CONTENTS, st.booleans())
def test_any_bytes_are_made_fit_and_decode_to_the_same_bytes(body: bytes, clear: bool) -> None:
    made = prepare(b"\n" + body, clear=clear)
    assert is_fit(made, clear=clear)
    assert contents(made) == [re.sub(rb"\r?\n", b"\r\n", body)]


@settings(PROPERTY, max_examples=30)
@given(entity=entities(), opaque=st.booleans())
def test_any_entity_verifies_once_signed(entity: bytes, opaque: bool, keys: Path, openssl: Openssl) -> None:
    signed = sign(prepare(entity, clear=not opaque), keys, opaque=opaque)
    assert_same(entity, openssl.verify(signed), clear=not opaque)


def test_from_at_the_very_start_of_the_text_is_encoded_under_a_clear_signature(inner: Inner) -> None:
    entity = email.message_from_bytes(inner(mail(b"From here\r\nto there\r\n"), "--sign"))
    assert entity.get_payload(decode=True) == b"From here\r\nto there\r\n"
    assert not str(entity.get_payload()).startswith("From ")


# ---------------------------------------------------------------------------------- any addresses, any message

COMMENTS = st.text('a ,;:<>@".[]', max_size=6).map(lambda text: f"({text}(b((c)d))\\))")
GAPS = st.sampled_from(["", " ", "\r\n\t"]) | COMMENTS
PHRASES = ["Ann", "A. B\tC", '"D, \\"E\\" <f@g>"', '"" H', "=?utf-8?Q?a=2C?= b", "Jürgen", '"ü;:"']
QUOTED = st.text('ab ,;:<>@()[]."\\', max_size=6).map(lambda text: re.sub(r'(["\\])', r"\\\1", text))
LOCALS = st.from_regex(r"[a-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[a-z0-9é-]+)?", fullmatch=True) | QUOTED.map('"{}"'.format)
DOMAINS = st.sampled_from(["x.org", "y-z.example", "[192.0.2.1]", "[IPv6:::1]", "bücher.example"])


@st.composite
def address_lists(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A list of addresses in the syntax of RFC 5322 section 3.4, and the addresses in it."""
    wanted = draw(st.lists(st.tuples(LOCALS, DOMAINS).map("@".join), min_size=1, max_size=4, unique=True))
    items = []
    for address in wanted:
        named = draw(st.sampled_from(["", *PHRASES])) + draw(GAPS) + f"<{draw(GAPS)}{address}{draw(GAPS)}>"
        item = draw(GAPS) + draw(st.sampled_from([address, named])) + draw(GAPS)
        items.append(f"{draw(st.sampled_from(PHRASES))}{draw(GAPS)}:{item};" if draw(st.booleans()) else item)
    return ",".join(items), wanted


@PROPERTY
@given(address_lists())
def test_any_list_of_addresses_is_read(case: tuple[str, list[str]]) -> None:
    rendered, wanted = case
    assert recipients(f"To: {rendered}") == wanted


PLAIN = f"From: {STEVE}\nTo: {STEVET}\n".encode()
DATES = [b"", b"1 Jan 0001 0:0:0 +9999", b"1 Jan " + b"9" * 5000, b"-0000", b"\xe9"]
FIELDS = [b"Bcc: a@x.org (\xe9\n", b"To: <,;:\n", b"From : x\n", b"\xe9: x\n", b"Subject: =?a\0?b?\xe9?= \r\r\n"]
FIELDS += [b"Content-Type: multipart/mixed; boundary%b\n" % b for b in (b"=b", b"=b\r", b"=\xe9", b'="', b"*=idna''b")]
FIELDS += [b"Content-Type: multipart/signed; boundary=b\n", b"Content-Type: multipart/mixed; boundary*0*=a\0'b'c\n"]
FIELDS += [b"Content-Transfer-Encoding: %b\n" % e for e in (b"base64", b"8bit", b"x-uuencode", b"\xe9", b"")]
FIELDS += [b"Content-Type: message/%b\n" % e for e in (b"rfc822", b"partial", b"delivery-status")]
FIELDS += [b"Subject: =?idna?Q?\xe9" + b"." * 70 + b"?=\n", *(b"Date: " + date + b"\n" for date in DATES)]
PIECES = [*CHUNKS, b"\n\n", b"\n--b\n", b"\n--b--\n", b"--\xe9\n", b"begin 6 x\n!", *FIELDS]
MESSAGES = st.tuples(
    st.sampled_from([b"", PLAIN, PLAIN]),
    st.lists(st.sampled_from(FIELDS), max_size=3).map(b"".join),
    st.lists(st.sampled_from(PIECES), max_size=9).map(b"".join) | st.binary(),
).map(b"".join)


@pytest.mark.parametrize("flags", ALL)
def test_a_boundary_that_is_no_text_is_sent_all_the_same(run: Run, flags: Flags) -> None:
    data = b"Content-Type: multipart/mixed; boundary*=utf-7''%2B2AA-\r\n" + mail(b"\xff\r\n")
    assert run("-", *flags, data=data).returncode == 0


@PROPERTY
@given(data=MESSAGES, flags=st.sampled_from(ALL))
def test_no_message_gives_a_traceback(data: bytes, flags: Flags, keys: Path) -> None:
    (keys / "mail").write_bytes(data)
    assert script.main([str(keys / "mail"), "--keys", str(keys), *flags]) in (0, 1)


def test_a_boundary_stands_beside_a_charset_that_is_nonsense(run: Run, inner: Inner) -> None:
    entity = multipart(TEXT + UNFIT["raw"], TEXT).replace(b'="=b"', b"=\"=b\"; charset*=%00''x")
    parts = email.message_from_bytes(inner(message(entity), "--sign"))
    assert [parts["Content-Transfer-Encoding"], len(parts.get_payload())] == [None, 2]


def test_what_stands_after_the_last_boundary_is_no_part(run: Run) -> None:
    signed = b"\r\n--=b\r\nContent-Type: multipart/signed; boundary=c\r\n\r\n--c\r\n\r\n%b\r\n--c--\r\n" % E
    done = run("-", "--sign", data=message(multipart(TEXT + UNFIT["raw"]) + signed))
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("flags", ALL)
def test_a_bcc_below_a_line_that_ends_the_header_is_not_sent_as_text(run: Run, flags: Flags) -> None:
    data = f"From: {STEVE}\nTo: {STEVET}\nRéf: 1\nBcc: {BOB}\n\nHello\n".encode()
    assert "no field" in refusal(run, data, *flags)


def test_date_now_leaves_one_date(run: Run) -> None:
    output = printed(run, b"Date: x\r\n" + mail(Date="y"), "--date_now")
    assert len(values(output, "Date")) == 1


N = 200_000
HTML = b"Content-Type: text/html; charset=us-ascii\r\nMIME-Version: 1.0\r\n"
HEAVY: dict[str, tuple[bytes, Flags]] = {
    "a long word": (b"Subject: " + b"a" * 1_000_000 + b"\r\n" + mail(), ("--sign", "--opaque")),
    "blanks in an address": (b"From: a@b.c\r\nTo: <a" + b" " * N + b"b@c>\r\n\r\nx\r\n", ()),
    "quotation marks": (b'From: a@b.c\r\nTo: a@b.c (c) "' + b'\\"' * (N // 2) + b"\r\n\r\nx\r\n", ()),
    "open encoded word": (b"X: =?utf-8?Q?" + E * (N // 2) + b"\r\n" + mail(), ()),
    "comments": (HTML + mail(b"<!--\r\n" * (N // 6)), ("--encrypt", "--protect_headers")),
    "body tags": (HTML + mail(b"<body \r\n" * (N // 8)), ("--encrypt", "--protect_headers")),
    "open body tags": (HTML + mail(b'<body a="\r\n' * (N // 11)), ("--encrypt", "--protect_headers")),
    "blanks in a field": (b"X: " + b" " * N + b"x\r\n" + mail(), ("--sign", "--protect_headers")),
    "blanks in fields": (b"Content-Type: message/delivery-status\r\n" + mail(b" " * N + b"x\xff\r\n"), SIGN),
}


@pytest.mark.parametrize(("data", "flags"), HEAVY.values(), ids=HEAVY)
def test_the_time_for_absurd_input_grows_with_its_length_only(run: Run, data: bytes, flags: Flags) -> None:
    began = time.monotonic()
    done = run("-", *flags, data=data)
    assert time.monotonic() - began < 15  # each took over 20 seconds when it grew with the square
    assert len(done.stderr) < 1000
