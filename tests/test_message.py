"""The message: envelope, header and MIME entity, as openssl and Python's e-mail parser read what comes out."""

from __future__ import annotations

import base64
import email
import importlib.util
import re
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from email.header import decode_header
from email.message import Message
from email.policy import default
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from types import ModuleType

import pytest
from conftest import BOB, CAROL, SCRIPT, STEVE, STEVET, Run, mail
from hypothesis import given, settings
from hypothesis import strategies as st
from pki import Authority
from readers import Openssl, command, cut_signed, der_of

Inner = Callable[..., bytes]
SIGN, OPAQUE, ENCRYPT, BOTH = ("--sign",), ("--sign", "--opaque"), ("--encrypt",), ("--sign", "--encrypt")
FLAGS = [(), SIGN, OPAQUE, ENCRYPT, BOTH]
OLD = "Mon, 01 Jan 2024 00:00:00 +0000"
PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=200)


# ------------------------------------------ the names inside of the script that these tests know: all are here


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("script", SCRIPT)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    sys.modules["script"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def prepare(entity: bytes, *, clear: bool) -> bytes:
    fields, _, body = script.split_entity(entity)
    return bytes(script.make_entity(fields, body, clear=clear))


def sign(entity: bytes, keys: Path, *, opaque: bool) -> bytes:
    return bytes(script.sign(entity, script.load_signer(str(keys), STEVE, ""), opaque=opaque))


def outer_fields(header: bytes, *flags: str) -> list[bytes]:
    fields, _, _ = script.split_entity(header + b"\r\n")
    return list(script.outer_fields(fields, script.parse_args(["-", *flags]), domain="x.org"))


def recipients(header: str) -> list[str]:
    envelope = script.read_envelope(script.split_entity(f"From: a@x.org\r\n{header}\r\n".encode())[0], None)
    return [*envelope.recipients, *envelope.hidden]


# --------------------------------------------------------------------------------------- asking the program


def printed(run: Run, data: bytes, *flags: str, **variables: str) -> bytes:
    done = run("-", *flags, data=data, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(run: Run, data: bytes, *flags: str) -> str:
    """The one line that tells why nothing was printed."""
    done = run("-", *flags, data=data)
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rb"sparkpostSMIME\.py: [^\n]+\n", done.stderr)
    return done.stderr.decode()


@pytest.fixture
def inner(run: Run, openssl: Openssl, authority: Authority) -> Inner:
    """The entity in what the program makes with these flags, as openssl decrypts and verifies it."""

    def inner(data: bytes, *flags: str) -> bytes:
        output = printed(run, data, *flags)
        entity = output[output.index(b"Content-Type:") :]
        entity = openssl.decrypt(entity, authority.identity(STEVET)) if "--encrypt" in flags else entity
        return openssl.verify(entity) if "--sign" in flags else entity

    return inner


# ------------------------------------------------------------------------------------- reading what it made


def header_of(message: bytes) -> list[bytes]:
    return re.split(rb"\r\n(?![ \t])", message.partition(b"\r\n\r\n")[0])


def values(message: bytes, name: str) -> list[bytes]:
    """The values of all fields of that name, unfolded."""
    pairs = [field.replace(b"\r\n", b"").split(b":", 1) for field in header_of(message)]
    return [value.strip() for found, value in pairs if found.strip().lower() == name.encode()]


def shown(field: bytes) -> str:
    """An unstructured field as a mail program shows it (RFC 2047)."""
    text = field.partition(b":")[2].replace(b"\r\n", b"").decode("ascii").strip()
    words = [(word.encode() if isinstance(word, str) else word, charset) for word, charset in decode_header(text)]
    return "".join(word.decode(charset or "ascii") for word, charset in words)


def crlf(data: bytes) -> bytes:
    return re.sub(rb"\r?\n", b"\r\n", data)


def is_fit(data: bytes, *, clear: bool) -> bool:
    """RFC 8551 section 3.1, for data that has line ends of CRLF."""
    lines = data.split(b"\r\n")
    altered = any(line.startswith(b"From ") or line.endswith((b" ", b"\t")) for line in lines)
    plain = data.isascii() and not any(len(line) > 998 or re.search(rb"[\0\r\n]", line) for line in lines)
    return plain and not (clear and altered)


def encoding(part: Message) -> str:
    return str(part["Content-Transfer-Encoding"] or "7bit").strip().lower()


def is_binary(part: Message) -> bool:
    return encoding(part) == "binary" and part.get_content_maintype() != "text"


def parts(entity: bytes) -> list[Message]:
    """All parts, outermost first. Line ends are CRLF, but binary data has none."""
    found = list(email.message_from_string(entity.decode("latin-1")).walk())
    for leaf in found:
        if "Content-Transfer-Encoding" in leaf:  # Python reads no folded one
            leaf.replace_header("Content-Transfer-Encoding", encoding(leaf))
        if not leaf.is_multipart() and not is_binary(leaf):
            leaf.set_payload(re.sub("\r?\n", "\r\n", str(leaf.get_payload())))
    return found


def raw(leaf: Message) -> bytes:
    return str(leaf.get_payload()).encode("latin-1")


def skeleton(part: Message) -> tuple[object, ...]:
    """Type, parameters, number of parts; and of a leaf what it decodes to."""
    below = len(part.get_payload()) if part.is_multipart() else part.get_payload(decode=True)
    return part.get_content_type(), part.get_params(), below


def contents(entity: bytes) -> list[object]:
    return [leaf.get_payload(decode=True) for leaf in parts(entity) if not leaf.is_multipart()]


def multipart(*entities: bytes, kind: str = "mixed", boundary: str = "=b") -> bytes:
    pieces = b"".join(f"--{boundary}\r\n".encode() + entity + b"\r\n" for entity in entities)
    return (
        f'Content-Type: multipart/{kind}; boundary="{boundary}"\r\n\r\n'.encode()
        + pieces
        + f"--{boundary}--\r\n".encode()
    )


def message(entity: bytes) -> bytes:
    return mail().partition(b"\r\n\r\n")[0] + b"\r\n" + entity


# ------------------------------------------------------------------------------------------------- envelope


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("To: a@x.org, B <b@x.org>", "a b"),
        ("To: b@x.org\r\nBcc: a@x.org\r\ncc:\tc@x.org\r\nTO: d@x.org", "b d c a"),
        ("To: a@x.org, b@x.org\r\nCc: A <a@X.ORG>, c@x.org\r\nBcc: b@x.org", "a b c"),
        ("To: a@x.org\r\nRESENT-TO: z@x.org\r\nResent-Cc: y@x.org\r\nResent-Bcc: w@x.org", "a"),
        ("To: Team: a@x.org, B <b@x.org>;, c@x.org\r\nCc: undisclosed-recipients:;", "a b c"),
        ("To: a@x.org (A (nested, z@x.org) \\) end), (B) b@x.org", "a b"),
        ('To: a@x.org (5" disk), b@x.org (3" disk)', "a b"),
        ('To: "Doe, J. <z@x.org>" <a@x.org>, "\\"; z@x.org" <b@x.org>', "a b"),
        ("To: =?utf-8?Q?J=C3=BCrgen=2C_z=40x.org?= <a@x.org>, =?utf-8?B?w6k=?= <b@x.org>", "a b"),
        ("To: Jürgen <a@x.org>, Ω\r\n <b@x.org>,\r\n\tc@x.org", "a b c"),
        ("To: pete(his account)@x.org, <pat @ x.org>, paul@ (home) x.org", "pete pat paul"),
        ("To: , <@y.org,@z.org:a@x.org>,, b@x.org,", "a b"),
    ],
)
def test_recipients_are_all_of_to_cc_and_bcc_once_and_in_order(run: Run, header: str, expected: str) -> None:
    data = f"From: {STEVE}\r\n{header}\r\n\r\n".encode()
    done = run("-", "--encrypt", "--send_smtp", data=data, SMTP_HOST="127.0.0.1", SMTP_PORT="1")
    assert done.returncode == 1
    assert re.findall(rb"([^\s/]+)@[xX]\.(?:org|ORG)\.crt not found", done.stderr) == expected.encode().split()


def test_an_encrypted_message_is_for_each_recipient_once(run: Run, openssl: Openssl, authority: Authority) -> None:
    output = printed(run, mail(To=f'"B, C" <{BOB}>, {STEVET}', Cc=f"{BOB}, {STEVET} (again)", Bcc=CAROL), "--encrypt")
    listing = command("openssl", "cms", "-cmsout", "-print", "-noout", "-inform", "DER", data=der_of(output))
    serials = [int(serial, 0) for serial in re.findall(rb"serialNumber: (\w+)", listing)]
    assert serials == [authority.identity(address).certificate.serial_number for address in (BOB, STEVET)]
    for address in (BOB, STEVET):
        assert b"Hello" in openssl.decrypt(output, authority.identity(address))


@pytest.mark.parametrize(
    "to",
    [None, "undisclosed-recipients:;", "bob", "bob@", "@x.org", "<>", "a@x.org b@x.org", "<a@x.org> <b@x.org>"]
    + ["a@x.org, Bob <bob>", 'a@x.org, "open', "a@x.org (open", "a@b@x.org", "a@x.org: b@x.org;", "a(x)b@x.org"]
    + ["a\rb@x.org", "a\0b@x.org", '"a\rRCPT"@x.org', "<a@x.org\r>", "<a\r\n b@x.org>", "a@x\x7f.org"],
)
def test_recipients_that_cannot_be_read_are_refused(run: Run, to: str) -> None:
    told = refusal(run, mail(To=to, Cc=STEVET if to and "@" in to else None))
    assert re.search(r"the (to|To) field|no recipient", told)


@pytest.mark.parametrize(
    "sender", [None, "Group:;", f"{STEVE}, {BOB}", "Steve", "a\0@x.org", f"a@x.org\r\nFrom: {BOB}"]
)
def test_a_message_without_one_sender_is_refused(run: Run, sender: str) -> None:
    assert re.search(r"the [fF]rom field|no sender", refusal(run, mail(From_=sender)))


@pytest.mark.parametrize("address", ["a@x.org\r\nRCPT TO:<b@x.org>", "a@x.org\n", "a@x.org, b@x.org", "Steve"])
def test_a_return_path_that_is_no_address_is_refused(run: Run, address: str) -> None:
    assert "--return_path" in refusal(run, mail(), "--return_path", address)


def test_several_authors_need_a_sender(run: Run) -> None:
    output = printed(run, mail(From_=f"{STEVE}, {BOB}", Sender=f"Steve <{STEVE}>"), "--sign")
    assert values(output, "from") == [f"{STEVE}, {BOB}".encode()]


# --------------------------------------------------------------------------------------------------- header


@pytest.mark.parametrize("flags", FLAGS)
def test_header_fields_stay_as_they_are_and_in_order(run: Run, flags: tuple[str, ...]) -> None:
    kept = [b"Received: from a\r\n\tby b;\r\n    then", b"X-one:no blank", b"DATE:  1 Jan 2024 00:00:00 +0000 (UTC) "]
    kept += [b"from\t: Steve <steve@thetucks.com>", b"X-Empty:", b"To:\t" + STEVET.encode() + b",\r\n\t", b"X-one: 2"]
    kept += [b"Subject: =?utf-8?Q?a?=  \"b\" 'c'\t<d>", b"MESSAGE-ID: <1@x>", b"X-998: " + b"x y" * 330 + b"z"]
    kept += [b"MIME-version: 1.0 (by hand)", b"Contents: here", b"Resent-To: nobody"]
    gone = [b"Bcc: " + CAROL.encode(), b"bcc:\r\n " + BOB.encode(), b"Resent-BCC: x", b"Return-Path: <x@y>"]
    gone += [b"Content-Length: 99", b"mime-version: 1.0"]
    header = header_of(printed(run, b"\r\n".join([*kept, *gone, b"", b"Hello\r\n"]), *flags))
    assert [field for field in header if not field.startswith(b"Content-")] == kept


@pytest.mark.parametrize("flags", FLAGS[1:])
def test_content_fields_move_into_the_entity(run: Run, inner: Inner, flags: tuple[str, ...]) -> None:
    moved = [b"CONTENT-TYPE: text/html;\r\n charset=us-ascii", b"content-language:\r\n\tde", b"Content-X: y"]
    data = b"\r\n".join([moved[0], b"Content-Length: 9", mail().partition(b"\r\n\r\n")[0], *moved[1:], b"", b"<p>\r\n"])
    output = printed(run, data, *flags)
    assert values(output, "content-language") + values(output, "content-x") + values(output, "content-length") == []
    assert len(values(output, "content-type")) == 1
    assert inner(data, *flags) == b"\r\n".join([*moved, b"", b"<p>\r\n"])


@pytest.mark.parametrize("flags", [(), SIGN])
def test_a_leading_mbox_line_is_dropped(run: Run, flags: tuple[str, ...]) -> None:
    output = printed(run, b"From steve@thetucks.com Mon Jan  1 00:00:00 2024\r\n" + mail(), *flags)
    assert output.startswith(b"From: Steve")
    assert b"From steve" not in output


def test_a_from_field_with_a_blank_before_the_colon_is_no_mbox_line(run: Run) -> None:
    assert printed(run, mail().replace(b"From:", b"From :")).startswith(b"From : Steve")


@pytest.mark.parametrize("flags", FLAGS)
def test_dkim_signatures_stay_only_where_nothing_changes(run: Run, flags: tuple[str, ...]) -> None:
    output = printed(run, mail(dkim_SIGNATURE="v=1; b=abc"), *flags)
    assert values(output, "dkim-signature") == ([] if flags else [b"v=1; b=abc"])


@pytest.mark.parametrize("field", ["X-None: 1", "MIME-Version: 1.0", "mime-version:1.0\r\nMime-Version: 1.0"])
@pytest.mark.parametrize("flags", [(), SIGN, ENCRYPT])
def test_there_is_exactly_one_mime_version(run: Run, flags: tuple[str, ...], field: str) -> None:
    assert values(printed(run, field.encode() + b"\r\n" + mail(), *flags), "mime-version") == [b"1.0"]


def test_date_and_message_id_are_added_where_missing(run: Run) -> None:
    output = printed(run, mail())
    assert re.fullmatch(rb"<[^@\s<>]+@thetucks\.com>", values(output, "message-id")[0])
    assert re.fullmatch(rb"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4}", values(output, "date")[0])


def test_date_now_replaces_the_date_in_its_place(run: Run) -> None:
    output = printed(run, mail(Date=OLD, X_Last="1"), "--date_now")
    assert [field.split(b":")[0] for field in header_of(output)][3:5] == [b"Date", b"X-Last"]
    (date,) = values(output, "date")
    distance = parsedate_to_datetime(date.decode().replace("-0000", "+0000")) - datetime.now(timezone.utc)
    assert abs(distance.total_seconds()) < 60


@pytest.mark.parametrize("flags", [*FLAGS, (*SIGN, "--date_now")])
@pytest.mark.parametrize(("date", "stale"), [(OLD, True), ("today", True), (formatdate(), False), (None, False)])
def test_a_stale_date_is_told_when_signing(run: Run, date: str, stale: bool, flags: tuple[str, ...]) -> None:
    done = run("-", *flags, data=mail(Date=date), TZ="EST5")
    assert done.returncode == 0
    assert (b"--date_now" in done.stderr) == (stale and "--sign" in flags and "--date_now" not in flags)
    assert done.stderr.count(b"\n") == (b"--date_now" in done.stderr)


NAMES = ["X-A", "Subject", "RECEIVED", "To", "from", "bCC", "Resent-BCC", "return-Path", "CONTENT-length"]
NAMES += ["Content-Foo", "DKIM-signature", "Mime-Version", "Date", "message-ID", "Comments", "Contentious"]
LINES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
FIELDS = st.tuples(st.sampled_from(NAMES), LINES, st.lists(LINES.map(lambda line: f"\r\n\t{line}."), max_size=2))


@PROPERTY
@given(st.lists(FIELDS), st.sampled_from(FLAGS))
def test_no_field_changes_but_the_named_ones(fields: list[tuple[str, str, list[str]]], flags: tuple[str, ...]) -> None:
    expected, seen = [], set()
    for name, line, folded in fields:
        low = name.lower()
        gone = low in ("bcc", "resent-bcc", "return-path", "content-length")
        gone |= bool(flags) and (low == "dkim-signature" or low.startswith("content-"))
        if not gone and not (low == "mime-version" and low in seen):
            expected.append(f"{name}:{line}{''.join(folded)}".encode())
            seen.add(low)
    header = "".join(f"{name}:{line}{''.join(folded)}\r\n" for name, line, folded in fields)
    outer = outer_fields(header.encode(), *flags)
    assert outer[: len(expected)] == expected
    added = {field.split(b":")[0].lower().decode() for field in outer[len(expected) :]}
    assert added == {"date", "message-id", "mime-version"} - seen


# ------------------------------------------------------------------------------------- raw text, long fields


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Grüße, (Jürgen) €".encode(), "Grüße, (Jürgen) €"),
        ("Grüße".encode("latin-1"), "Grüße"),
        ("=?utf-8?Q?a?= é =?utf-8?Q?b?= c".encode(), "a é b c"),
        ("=?utf-8?Q?a?=\r\n\té\r\n é".encode(), "a\té é"),
        ("é  è".encode(), "é  è"),
        ("=?utf-8?Q?Gr\xfc=C3=9Fe?=".encode(), "Grüße"),
        (b"=?iso-8859-1?q?Gr\xfc=DFe?=", "Grüße"),
        ("wort ".encode() + "é".encode() * 300, "wort " + "é" * 300),
    ],
)
def test_raw_text_is_shown_the_same_as_encoded_words(run: Run, value: bytes, text: str) -> None:
    output = printed(run, b"X-Raw: " + value + b"\r\n" + mail())
    assert output.isascii()
    assert shown(header_of(output)[0]) == text


@pytest.mark.parametrize("charset", ["utf-8", "latin-1"])
@pytest.mark.parametrize(
    ("to", "names"),
    [
        ("Jürgen Müller <@>", ["Jürgen Müller"]),
        ('"Müller, \\"J\\" Jürgen" <@>', ['Müller, "J" Jürgen']),
        ("=?utf-8?Q?a?= é <@>, é =?utf-8?Q?b?= <@>", ["a é", "é b"]),
        ('Müller<@>, "Jürgen"<@>', ["Müller", "Jürgen"]),
        ("@ (Jürgen \\) Müller), Bob <@>", ["", "Bob"]),
        ("Bücher: é <@>, e <@>;", ["é", "e"]),
        ("Jürgen@Home <@>", ["Jürgen@Home"]),
    ],
)
def test_raw_names_become_words_and_addresses_stay(run: Run, to: str, names: list[str], charset: str) -> None:
    header = to.replace("<@>", f"<{STEVET}>").replace("@ (", f"{STEVET} (").encode(charset)
    output = printed(run, b"From: " + STEVE.encode() + b"\r\nTo: " + header + b"\r\n\r\n")
    assert output.isascii()
    field = email.message_from_bytes(output, policy=default)["To"]
    assert [(a.display_name, a.addr_spec) for a in field.addresses] == [(name, STEVET) for name in names]
    for token in re.split(rb"[\s()]+", values(output, "to")[0]):  # RFC 2047 section 5: nothing touches a word
        assert b"?=" not in token or re.fullmatch(rb"=\?[\w-]+\?[BQbq]\?[^?]*\?=", token)


@pytest.mark.parametrize("end", [b"", b"   "])
def test_a_long_field_is_folded_at_white_space(run: Run, end: bytes) -> None:
    field = b"X-Long:" + b" word, another\tword" * 200 + end
    folded = header_of(printed(run, field + b"\r\n" + mail()))[0]
    assert folded.replace(b"\r\n", b"") == field
    assert all(len(line) <= 998 and line.strip() for line in folded.split(b"\r\n"))
    assert folded.count(b"\r\n") == len(field) // 990


@PROPERTY
@given(st.text('abé ü€😀\t"(),.=_', min_size=1, max_size=80), st.sampled_from(["utf-8", "latin-1"]))
def test_any_raw_subject_is_shown_the_same(text: str, charset: str) -> None:
    value = text.encode(charset, "replace")
    (field,) = [field for field in outer_fields(b"Subject: " + value + b"\r\n") if field.startswith(b"Subject")]
    assert field.isascii()
    assert shown(field) == value.decode(charset).strip()


# ----------------------------------------------------------------------------------------- line ends, passing


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("flags", FLAGS)
def test_line_ends_of_the_output_are_those_of_the_input(run: Run, flags: tuple[str, ...], line_end: bytes) -> None:
    output = printed(run, mail(b"a\r\n\r\nb\r\n").replace(b"\r\n", line_end), *flags)
    assert output.count(b"\n") == output.count(line_end) > 5
    assert output.count(b"\r") == output.count(b"\r\n")


def test_without_flags_the_body_stays_and_content_fields_stay_outside(run: Run) -> None:
    body = b"From me \r\nFrom: you\r\n" + bytes(range(256)).replace(b"\n", b"") + b"x" * 2000 + b"\r\n\r\n"
    output = printed(run, mail(body, Content_Type="text/html", content_X="y", Bcc=BOB))
    assert output.endswith(b"\r\n\r\n" + body)
    assert (values(output, "content-type"), values(output, "content-x")) == ([b"text/html"], [b"y"])
    assert BOB.encode() not in output


# --------------------------------------------------------------------------------------------------- entity

TEXT, DATA = b"Content-Type: text/plain\r\n\r\n", b"Content-type:application/x-data\r\n\r\n"
RFC822 = b"Content-Type: message/rfc822\r\n\r\n"
UNFIT = {"raw": "café".encode(), "long": b"x" * 999, "NUL": b"a\0b", "CR": b"a\rb"}
ALTERED = {"From": b"a\r\nFrom me", "blank": b"a \r\nb", "tab at the end": b"a\t"}
SIGNED = multipart(TEXT + b"%b", DATA + b"AAAA", kind='signed; protocol="application/pkcs7-signature"', boundary="s")


@pytest.mark.parametrize("flags", FLAGS[1:])
def test_what_is_fit_is_carried_byte_for_byte(inner: Inner, flags: tuple[str, ...]) -> None:
    body = b"preamble\n--=b\nX-A:  b\nCONTENT-type : TEXT/plain\n\n=20 >From me\n.\n" + b"x" * 998 + b"\n\n"
    body += b"Content-Transfer-Encoding: 8bit\n--=b\n\n--=b--\nepilogue"
    data = message(b'Content-Type: multipart/mixed;\n boundary="=b"\n\n' + body).replace(b"\r\n", b"\n")
    assert inner(data, *flags) == b'Content-Type: multipart/mixed;\r\n boundary="=b"\r\n\r\n' + crlf(body)


@pytest.mark.parametrize("flags", FLAGS[1:])
@pytest.mark.parametrize("fault", [*UNFIT, *ALTERED])
def test_only_the_leaf_at_fault_is_encoded(inner: Inner, fault: str, flags: tuple[str, ...]) -> None:
    body = {**UNFIT, **ALTERED}[fault]
    fit = b"content-type: text/x;\r\n\ta=b\r\n\r\n=41 stays\r\n"
    entity = multipart(fit, multipart(TEXT + body, DATA + body, boundary="=b2"))
    made = inner(message(entity), *flags)
    if fault in ALTERED and flags in (OPAQUE, ENCRYPT):
        assert made == entity
    else:
        assert is_fit(made, clear="--opaque" not in flags and "--sign" in flags)
        assert b"--=b\r\n" + fit + b"\r\n--=b\r\n" in made
        assert contents(made) == [b"=41 stays\r\n", body, body]
        found = [encoding(leaf) for leaf in parts(made) if not leaf.is_multipart()]
        assert found == ["7bit", "quoted-printable", "base64"]


def test_quoted_printable_breaks_long_lines_alone(inner: Inner) -> None:
    body = b"A short line\r\n\r\nx\r\n" + b"y" * 76 + b"\r\n"
    made = inner(message(TEXT + body + "é\r\n".encode() * 2 + b"z" * 77 + b"\r\n"), "--sign")
    assert made.partition(b"\r\n\r\n")[2] == body + b"=C3=A9\r\n" * 2 + b"z" * 75 + b"=\r\nzz\r\n"


@pytest.mark.parametrize("label", [":8bit", ": BINARY", ":\r\n 8Bit", " : 8bit", ": (really) 8bit", ": 8bit; x=y"])
@pytest.mark.parametrize("flags", [SIGN, ENCRYPT])
def test_ascii_called_eight_bit_becomes_seven_bit(inner: Inner, label: str, flags: tuple[str, ...]) -> None:
    text = b"Content-Transfer-Encoding" + label.encode() + b"\r\n" + TEXT + b"ASCII\r\n"
    made = inner(message(multipart(text, RFC822 + text)), *flags)
    assert not re.search(rb"8bit|binary", made, re.IGNORECASE)
    assert contents(made) == [b"ASCII\r\n"] * 2


@pytest.mark.parametrize("flags", FLAGS[1:])
def test_binary_data_stays_the_same_bytes(inner: Inner, flags: tuple[str, ...]) -> None:
    data = bytes(range(256)) + b"\n\r\n\r\r\n \n" * 3
    leaf = b"Content-Transfer-Encoding: Binary\r\nContent-Type: image/png\r\n\r\n"
    made = inner(message(multipart(leaf + data, leaf + b"a\nb")), *flags)
    assert contents(made) == [data, b"a\nb"]


@pytest.mark.parametrize("flags", [SIGN, BOTH])
def test_a_message_in_a_message_is_never_encoded_itself(inner: Inner, flags: tuple[str, ...]) -> None:
    letter = "Subject: Grüße\r\nContent-Type: text/plain; charset=utf-8\r\n\r\né\r\n".encode()
    eight = b"Content-Transfer-Encoding: 8bit\r\n"
    digest = multipart(b"\r\n" + letter, eight + b"\r\n" + letter, kind="digest", boundary="=d")
    made = inner(message(eight + multipart(eight + RFC822 + letter, digest)), *flags)
    found = parts(made)
    assert is_fit(made, clear=True)
    assert [part.get_content_type() for part in found if part.get_content_type() != "text/plain"] == [
        *("multipart/mixed", "message/rfc822", "multipart/digest", "message/rfc822", "message/rfc822")
    ]
    assert {encoding(part) for part in found if part.is_multipart()} == {"7bit"}
    assert contents(made) == ["é\r\n".encode()] * 3
    assert [shown(b":" + part["Subject"].encode()) for part in found if part["Subject"]] == ["Grüße"] * 3


def test_an_international_address_in_a_message_within_does_not_make_the_entity_eight_bit(run: Run) -> None:
    done = run("-", "--sign", data=message(RFC822 + "To: ü@x.org\r\n\r\nHello\r\n".encode()))
    assert done.returncode == 1 or (done.returncode == 0 and done.stdout.isascii())


@pytest.mark.parametrize("text", [b"A text", b"Quoting Content-Transfer-Encoding: 8bit"])
def test_a_signed_part_is_carried_unaltered(inner: Inner, text: bytes) -> None:
    signed = SIGNED % text
    made = inner(message(multipart(signed, TEXT + UNFIT["raw"])), "--sign")
    assert b"--=b\r\n" + signed + b"\r\n--=b\r\n" in made
    assert is_fit(made, clear=True)


@pytest.mark.parametrize("text", [*UNFIT.values(), *ALTERED.values()])
def test_an_unfit_signed_part_asks_for_opaque(run: Run, inner: Inner, text: bytes) -> None:
    data = message(multipart(SIGNED % text, TEXT + UNFIT["raw"]))
    assert "--opaque" in refusal(run, data, "--sign")
    for flags in (OPAQUE, ENCRYPT):
        made = inner(data, *flags)
        assert b"--=b\r\n" + SIGNED % text + b"\r\n--=b\r\n" in made
        assert encoding(parts(made)[-1]) == "quoted-printable"


@pytest.mark.parametrize(("body", "charset"), [(b"a\r\n", "ascii"), ("é".encode(), "utf-8"), (b"\xe9", "latin-1")])
def test_without_a_content_type_it_is_plain_text(inner: Inner, body: bytes, charset: str) -> None:
    (part,) = parts(inner(mail(body), "--sign"))
    assert part.get_content_type() == "text/plain"
    assert bytes(part.get_payload(decode=True)).decode(part.get_content_charset("ascii")) == body.decode(charset)


@pytest.mark.parametrize("charset", ["utf-8", "latin-1"])
def test_a_raw_file_name_is_read_as_before(inner: Inner, charset: str) -> None:
    field = b'Content-Disposition: attachment; filename="Gr\xc3\xbc\xc3\x9fe; 1.pdf"; size=1'.decode().encode(charset)
    (part,) = parts(inner(message(field + b"\r\n" + DATA + b"x"), "--sign"))
    assert part.get_filename() == "Grüße; 1.pdf"
    assert part.get_param("size", header="Content-Disposition") == "1"


@pytest.mark.parametrize("kind", ["multipart/mixed; boundary=none", "multipart/mixed", "message/partial; id=x"])
def test_the_text_of_a_broken_part_is_not_lost(run: Run, inner: Inner, kind: str) -> None:
    data = message(b"Content-Type: " + kind.encode() + "\r\n\r\nX: y\r\n\r\né\r\n".encode())
    if run("-", "--sign", data=data).returncode == 0:
        assert any("é".encode() in bytes(found) for found in contents(inner(data, "--sign")))
    else:
        refusal(run, data, "--sign")


@pytest.mark.parametrize("boundary", ["*=idna''=b", "*=punycode''%FF", "*=undefined''x", "*" + "9" * 5000 + "=x"])
def test_odd_boundary_parameters_give_no_traceback(run: Run, boundary: str) -> None:
    data = message(f"Content-Type: multipart/mixed; boundary{boundary}\r\n\r\n--=b\r\n\r\né\r\n--=b--\r\n".encode())
    assert run("-", "--sign", data=data).returncode in (0, 1)


def test_parts_in_parts_without_end_are_refused(run: Run) -> None:
    entity = TEXT + UNFIT["raw"]
    for level in range(200):
        entity = multipart(entity, boundary=f"={level}")
    assert "deep" in refusal(run, message(entity), "--sign")


def test_the_boundary_does_not_occur_in_the_entity(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = bytes(16), b"\1" * 16
    bytes_drawn = [taken, free]
    monkeypatch.setattr("os.urandom", lambda size: bytes_drawn.pop(0))
    entity = TEXT + taken.hex().encode() + b"\r\n----=_" + taken.hex().encode()
    assert cut_signed(sign(entity, keys, opaque=False))[0] == entity


# ------------------------------------------------------------------------------- properties of any entity

CHUNKS = [b"text", b"\n", b"\r\n", b" ", b"\t", b"From ", b"\nFrom me", b" \r\n", b"\r", b"\0", b"\xe9", "é".encode()]
CHUNKS += [
    b"=",
    b"=20",
    b"=\n",
    b"=e9",
    b".",
    b"--",
    b"x" * 999,
    b"\x7f",
    b"\nContent-Transfer-Encoding: 8bit\n",
    b"A: c\n",
]
CONTENTS = st.binary(max_size=30) | st.lists(st.sampled_from(CHUNKS), max_size=8).map(b"".join)
ENCODINGS = ["7bit", "8bit", "8BIT ", "binary", "Binary", "quoted-printable", "Quoted-Printable", "base64", "BASE64"]
TYPES = [
    "text/plain; charset=utf-8",
    'TEXT/Html;\n\tcharset="x;y"',
    "application/x-data ; a=b",
    "image/png",
    "text/plain",
]


@st.composite
def entities(draw: st.DrawFn, depth: int = 0, typed: bool = True) -> bytes:
    """An entity with one kind of line ends between its lines, which need not be that of its parts."""
    kind = draw(
        st.sampled_from(["leaf", "leaf", "mixed", "alternative", "digest", "rfc822"] if depth < 3 else ["leaf"])
    )
    name = draw(st.sampled_from(["Content-Type:", "content-TYPE: ", "CONTENT-type:\n  "])).encode()
    label = "Content-transfer-ENCODING: " if draw(st.booleans()) else "content-transfer-encoding:\n\t"
    extra = draw(st.sampled_from([b"", b"X-A:  b \n", b"Content-ID: <a>\n", b"X-B: " + b"y " * 600 + b"\n"]))
    if kind == "leaf":
        code = draw(st.sampled_from([None, *ENCODINGS]))
        kinds = draw(st.sampled_from(TYPES))
        head = name + kinds.encode() + b"\n" if typed or draw(st.booleans()) else b""
        head += f"{label}{code}\n".encode() if code else b""
        body = draw(CONTENTS)
        if code and code.lower() == "base64":
            body = draw(st.sampled_from([b"", b"\n", b" \n", b"\n!\xe9"])).join([base64.b64encode(body), b""])
    elif kind == "rfc822":
        head, body = name + b"message/rfc822\n", b"Subject: \xe9\n" + draw(entities(depth + 1, False))
    else:
        boundary = b"b" * (depth + 1)
        head = (
            name
            + f"multipart/{kind};".encode()
            + draw(st.sampled_from([b' BOUNDARY="%b"\n', b"boundary=%b\n"])) % boundary
        )
        inside = draw(st.lists(entities(depth + 1, kind == "digest"), min_size=1, max_size=3))
        inside = [b"\nSubject: x\n" + part for part in inside] if kind == "digest" and draw(st.booleans()) else inside
        body = draw(st.sampled_from([b"", b"preamble\n", b"From \xe9\n"]))
        body += b"".join(b"--%b\n%b\n" % (boundary + draw(st.sampled_from([b"", b" "])), part) for part in inside)
        body += (
            draw(st.sampled_from([b"--%b--", b"--%b--\n", b"--%b--\n \xe9"])) % boundary if draw(st.booleans()) else b""
        )
    head = extra + head
    return (
        (head.replace(b"\n", b"\r\n") if draw(st.booleans()) else head) + draw(st.sampled_from([b"\n", b"\r\n"])) + body
    )


def assert_same(before: bytes, after: bytes, *, clear: bool) -> None:
    """Every part is the same, and where it is a leaf without fault even in its encoding."""
    old, new = parts(before), parts(after)
    assert [skeleton(part) for part in new] == [skeleton(part) for part in old]
    for was, is_ in zip(old, new, strict=True):
        if not was.is_multipart() and not is_binary(was) and is_fit(raw(was), clear=clear):
            assert raw(is_) == raw(was)
            assert encoding(is_) == encoding(was).replace("8bit", "7bit").replace("binary", "7bit")
        assert encoding(is_) in ("7bit", "quoted-printable", "base64")


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
    assert contents(made) == [crlf(body)]
    assert prepare(made, clear=clear) == made


@settings(PROPERTY, max_examples=30)
@given(entity=entities(), opaque=st.booleans())
def test_any_entity_verifies_once_signed(entity: bytes, opaque: bool, keys: Path, openssl: Openssl) -> None:
    signed = sign(prepare(entity, clear=not opaque), keys, opaque=opaque)
    assert_same(entity, openssl.verify(signed), clear=not opaque)


# ------------------------------------------------------------------------- properties of addresses, of all

COMMENTS = st.text('a ,;:<>@".[]', max_size=6).map(lambda text: f"({text}(b)\\))")
GAPS = st.sampled_from(["", " ", "\r\n\t"]) | COMMENTS
PHRASES = ["Ann", "A. B\tC", '"D, \\"E\\" <f@g>"', '"" H', "=?utf-8?Q?a=2C?= b", "Jürgen", '"ü;:"']
LOCALS = st.from_regex(r"[a-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[a-z0-9é-]+)?", fullmatch=True)
LOCALS |= st.text('ab ,;:<>@()[]."\\', max_size=6).map(lambda text: '"%s"' % re.sub(r'(["\\])', r"\\\1", text))
ADDRESSES = st.tuples(LOCALS, st.sampled_from(["x.org", "y-z.example", "[192.0.2.1]", "[IPv6:::1]", "bücher.example"]))


@st.composite
def address_lists(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A list of addresses in the syntax of RFC 5322 section 3.4, and the addresses in it."""
    wanted = ["@".join(pair) for pair in draw(st.lists(ADDRESSES, min_size=1, max_size=4, unique=True))]
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


LINES_OF_HEADERS = [
    b"From: steve@thetucks.com\n",
    b"To: steve.tuck@sparkpost.com\r\n",
    b"Bcc: a@x.org (\xe9\n",
    b"To: <,;:\n",
]
LINES_OF_HEADERS += [
    b"Content-Type: multipart/mixed; boundary=%s\n" % b for b in (b"b", b"b\r", b"\xe9", b'"', b'"b \0"')
]
LINES_OF_HEADERS += [
    b"Content-Type: multipart/%s; boundary*%s\n" % (b"signed", b) for b in (b"=idna''b", b"0*=a\0'b'c")
]
LINES_OF_HEADERS += [b"Content-Transfer-Encoding: %b\n" % e for e in (b"base64", b"8bit", b"x-uuencode", b"\xe9", b"")]
LINES_OF_HEADERS += [b"Content-Type: message/%b\n" % e for e in (b"rfc822", b"partial", b"delivery-status")]
LINES_OF_HEADERS += [
    b"Subject: =?idna?Q?\xe9" + b"." * 70 + b"?=\n",
    b"Subject: =?a\0?b?\xe9?= \r\r\n",
    b"From : x\n",
    b"\xe9: x\n",
]
LINES_OF_HEADERS += [
    b"Date: %b\n" % d for d in (b"", b"1 Jan 0001 0:0:0 +9999", b"1 Jan " + b"9" * 5000, b"-0000", b"\xe9")
]
PIECES = [*CHUNKS, b"\n\n", b"\n--b\n", b"\n--b--\n", b"--\xe9\n", b"begin 6 x\n!", *LINES_OF_HEADERS]
MESSAGES = st.tuples(
    st.sampled_from([b"", b"".join(LINES_OF_HEADERS[:2])]),
    st.lists(st.sampled_from(LINES_OF_HEADERS), max_size=3).map(b"".join),
    st.lists(st.sampled_from(PIECES), max_size=9).map(b"".join) | st.binary(),
).map(b"".join)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Path:
    """Key files for in-process use; an elliptic curve signs faster."""
    folder = tmp_path_factory.mktemp("keys")
    authority.identity(STEVE, "P-256").write(folder, private=True)
    authority.identity(STEVET).write(folder)
    return folder


@PROPERTY
@given(data=MESSAGES, flags=st.sampled_from(FLAGS))
def test_no_message_gives_a_traceback(data: bytes, flags: tuple[str, ...], keys: Path) -> None:
    (keys / "mail").write_bytes(data)
    assert script.main([str(keys / "mail"), "--keys", str(keys), *flags]) in (0, 1)
