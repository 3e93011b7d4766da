"""Header protection (RFC 9788): other programs decrypt and verify, and protected.py reads as the RFC says."""

from __future__ import annotations

import re
from collections.abc import Callable
from email import message_from_bytes
from email.message import Message
from email.policy import default
from html import unescape
from pathlib import Path

import pytest
from conftest import BOB, CAROL, SAMPLES, STEVE, STEVET, Run, mail
from pki import Authority
from protected import Finder, Leaf, Rendered, fields_of, is_structural, readable, render, text_of, walk
from readers import Openssl
from test_readers import inner

MODES = ["--sign", "--sign --opaque", "--encrypt", "--sign --encrypt"]
HIDDEN = ("comments", "keywords", "thread-topic")  # with --encrypt; the Subject is replaced
Protect = Callable[[bytes, str], "tuple[bytes, bytes, Rendered]"]


@pytest.fixture
def protect(run: Run, openssl: Openssl, authority: Authority) -> Protect:
    """Protect a message; what every protected message must be is checked here, against the message it is made of."""

    def protect(source: bytes, mode: str) -> tuple[bytes, bytes, Rendered]:
        done = run("-", "--protect_headers", *mode.split(), data=source)
        assert done.returncode == 0, done.stderr
        payload = inner(done.stdout)
        if "--encrypt" in mode:
            payload = openssl.decrypt(payload, authority.identity(STEVET))
        if "--sign" in mode:
            payload = openssl.verify(payload)
        signer = STEVE if "--sign" in mode else ""
        rendered = render(done.stdout, payload, encrypted="--encrypt" in mode, signer=signer)
        assert rendered.complaints == []
        assert done.stdout.isascii()
        assert payload.isascii() or "--sign" not in mode
        assert not re.search(rb"[ \t]\r\n", payload) or "--opaque" in mode or "--sign" not in mode
        assert max(map(len, done.stdout.splitlines() + payload.split(b"\r\n"))) <= 998
        check_fields(fields_of(source), fields_of(done.stdout), rendered, mode)
        texts = [part for part in walk(message_from_bytes(source)) if part.get_content_maintype() == "text"]
        subject = "".join(str(readable("", value)) for name, value in fields_of(source) if name == "subject")
        for part, leaf in zip(texts, rendered.leaves, strict=True):
            check_text(part, leaf, f"Subject: {subject}")
        return done.stdout, payload, rendered

    return protect


def check_fields(source: list[tuple[str, str]], printed: list[tuple[str, str]], rendered: Rendered, mode: str) -> None:
    """The user sees what was written, and nobody else the confidential fields."""
    encrypted, signed = "--encrypt" in mode, "--sign" in mode
    assert rendered.protection == ("cipher" if encrypted else "clear")
    dropped = ("bcc", "resent-bcc", "hp-outer")
    wanted = [(n, readable(n, v)) for n, v in source if not is_structural(n) and n not in dropped]
    names = {name for name, _ in wanted}
    fields = [(field.name, field.value) for field in rendered.fields]
    assert [(n, readable(n, v)) for n, v in fields if n in names] == wanted
    assert sorted(name for name, _ in fields if name not in names) == sorted({"date", "message-id"} - names)
    if encrypted:
        fields = [(n, "[...]" if n == "subject" else v) for n, v in fields if n not in HIDDEN]
    assert [(n, v.split()) for n, v in printed if not is_structural(n)] == [(n, v.split()) for n, v in fields]
    assert rendered.outer == (fields if encrypted else [])
    for name, value, state in rendered.fields:
        hidden = encrypted and name in ("subject", *HIDDEN) and value != "[...]"
        secret, public = ("signed-and-encrypted", "signed-only") if signed else ("encrypted-only", "unprotected")
        assert (name, state) == (name, secret if hidden else public)


def check_text(part: Message, leaf: Leaf, line: str) -> None:
    """The text is what it was, apart from an element that shows the Subject."""
    text, added = text_of(part), ("charset", "hp", "hp-legacy-display")
    old, new = ([p for p in each.get_params([]) if p[0].lower() not in added] for each in (part, leaf.part))
    assert (new[1:], leaf.part.get_content_type()) == (old[1:], part.get_content_type())
    if not leaf.element:
        assert leaf.text == leaf.shown == text
    elif part.get_content_subtype() == "plain":
        assert leaf.element.split() == line.split()
        assert leaf.element.count("\n") == 2
        assert leaf.shown == text
    else:
        before, _, after = leaf.text.partition(leaf.element)
        element = re.fullmatch(
            r"<div [^>]*><pre>((?:[^<>&\"']|&(?:amp|lt|gt|quot|apos|#\w+);)*)</pre></div>", leaf.element
        )
        assert element, leaf.element
        assert unescape(element[1]).split() == line.split()
        assert text in (before + after, before + after.removeprefix("\n"))
        assert len(before) == Finder(text).body


# ------------------------------------------------------------------------------------------- what the program makes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_sample(path: Path, mode: str, protect: Protect) -> None:
    elements = [leaf.part.get_content_subtype() for leaf in protect(path.read_bytes(), mode)[2].leaves if leaf.element]
    texts = {"alternative": ["plain", "html"], "attachments": ["html"], "fancy-HTML-to-smt": ["html"]}
    assert elements == (texts.get(path.stem, ["plain"]) if "--encrypt" in mode else [])


LETTER = mail(
    Cc=f'"Lumreeker, Bob" <{BOB}>',
    Bcc=CAROL,
    Resent_Bcc=CAROL,
    Subject="A secret",
    Thread_Topic="A secret",
    Comments="secret one",
    KEYWORDS="secret, two",
    Date="Tue, 01 Oct 2019 10:00:00 +0000",
    Message_ID="<1@thetucks.com>",
    Reply_To=f"Zoë <{BOB}>",
    References="<a@b.c>\r\n\t<d@e.f>",
    X_Long="word " * 250 + "end",
    X_Solid="x" * 985,
).replace(b"X-Long:", b"comments:secret three\r\nX-Tight:value\r\nX-Empty:\r\nX-Blank: a \r\n\tb \r\nX-Long:")


@pytest.mark.parametrize("mode", [*MODES, "--sign --encrypt --opaque"])
def test_a_letter_with_every_field(mode: str, protect: Protect) -> None:
    message, payload, _ = protect(LETTER, mode)
    assert CAROL.encode() not in message + payload
    assert (b"secret" in message) == ("--encrypt" not in mode)


@pytest.mark.parametrize("mode", ["--sign", "--encrypt"])
def test_the_other_fields_outside_stay_as_they_are(mode: str, run: Run) -> None:
    outputs = [run("-", mode, *more, data=LETTER).stdout for more in ([], ["--protect_headers"])]
    plain, protected = (output[: output.index(b"\nContent-Type:")] for output in outputs)
    if mode == "--encrypt":
        plain = re.sub(rb"(?im)^(comments|keywords|thread-topic):.*\n", b"", plain).replace(b"A secret", b"[...]")
    assert protected == plain


@pytest.mark.parametrize("field", ["jörg@example.com", f"{'x' * 1200}@example.com"], ids=["outside ASCII", "long"])
def test_what_no_server_carries_unaltered_may_stand_under_encryption(
    field: str, run: Run, openssl: Openssl, authority: Authority
) -> None:
    data = mail(Reply_To=field)
    done = run("-", "--sign", "--protect_headers", data=data)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"--opaque" in done.stderr
    done = run("-", "--sign", "--encrypt", "--protect_headers", data=data)
    assert (done.returncode, done.stderr) == (0, b"")
    payload = openssl.verify(openssl.decrypt(inner(done.stdout), authority.identity(STEVET)))
    assert re.search(rb"\r\nReply-To:\s+" + field.encode(), payload)


def test_without_a_signature_or_encryption_the_command_line_is_wrong(run: Run) -> None:
    done = run("-", "--protect_headers", data=mail())
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"--protect_headers" in done.stderr


# ------------------------------------------------------------------------------------- the legacy display elements


def entity(text: str = "MAIN text", kind: str = "text/plain", *fields: str) -> str:
    return "\r\n".join([f"Content-Type: {kind}", *fields, "", text])


def multipart(kind: str, *parts: str) -> str:
    boundary = f"b{sum(map(len, parts))}"
    inner = "".join(f"--{boundary}\r\n{part}\r\n" for part in parts)
    return f"Content-Type: multipart/{kind}; boundary={boundary}\r\n\r\n{inner}--{boundary}--\r\n"


def letter(content: str, **fields: str | None) -> bytes:
    return mail(b"", MIME_Version="1.0", **fields)[:-2] + content.encode()  # type: ignore[arg-type]


ATTACHED = "Content-Disposition: attachment; filename=a.txt"
TEXT, HTML, OTHER, FILE = entity(), entity(kind="text/html"), entity("OTHER"), entity("OTHER", "text/plain", ATTACHED)
PAGE, IMAGE = entity("<body>OTHER", "text/html", ATTACHED.upper()), entity("OTHER", "image/svg+xml")
MAIL = f"Content-Type: message/rfc822\r\n\r\nSubject: OTHER\r\n{OTHER}"
SIGNED = multipart("signed", OTHER, entity("AAAA", "application/pkcs7-signature"))
MARKED = entity("MAIN", "text/plain", "Content-Disposition: inline")
STRUCTURES = {
    "mixed": multipart("mixed", TEXT, OTHER, IMAGE, FILE, PAGE, MAIL, SIGNED),
    "related": multipart("related", HTML, OTHER, IMAGE),
    "nested": multipart("mixed", multipart("alternative", TEXT, multipart("related", HTML, IMAGE, OTHER)), OTHER),
    "alternative": multipart(
        "alternative",
        *(TEXT, HTML, TEXT.replace("plain", "PLAIN"), entity("OTHER", "text/calendar")),
        *(multipart("mixed", TEXT, OTHER), multipart("related", MARKED, OTHER)),
    ),
    "none": multipart(
        "alternative",
        *(FILE, PAGE, f"{ATTACHED}\r\n{multipart('alternative', OTHER, OTHER)}", MAIL, SIGNED),
        *(multipart("mixed", each, OTHER) for each in (FILE, IMAGE, MAIL, SIGNED)),
        multipart("x-unheard-of", OTHER, OTHER),
    ),
}


@pytest.mark.parametrize("content", STRUCTURES.values(), ids=STRUCTURES)
def test_only_main_body_parts_get_an_element(content: str, protect: Protect) -> None:
    _, payload, rendered = protect(letter(content), "--sign --encrypt")
    assert [bool(leaf.element) for leaf in rendered.leaves] == ["MAIN" in leaf.text for leaf in rendered.leaves]
    assert payload.count(b"hp-legacy-display=") == content.count("MAIN")
    for part in re.split(r"(?:\A|\r\n)--b[0-9]+(?:--)?(?=\r\n|\Z)", content)[1:]:
        assert "MAIN" in part or part.encode() in payload, part


def encoded(kind: str, content: bytes, encoding: str = "7bit") -> bytes:
    return f"Content-Type: {kind}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n".encode() + content


TEXTS = [
    encoded("text/plain; charset=us-ascii", b"Hello\r\n\r\nSteve"),
    encoded("text/plain; charset=us-ascii", b"\r\nbelow a blank line"),
    encoded("text/plain; charset=us-ascii; format=flowed", b"From here \r\n on"),
    encoded('text/plain; name="a; charset=b"', b""),
    b"\r\nof no type",
    encoded("text/plain; charset=utf-8", b"SGVsbG8sIHfDtnJsZAoKQnllCg==", "base64"),
    encoded("text/plain; charset=utf-8", b"Hello=2C w=C3=B6rld =\r\nand all=20\r\n", "quoted-printable"),
    encoded("text/plain; format=flowed; charset=utf-8", "Wörld \r\n".encode(), "8bit"),
    encoded("text/plain; charset=iso-8859-1", "Wörld".encode("latin-1"), "8bit"),
    encoded('text/plain;\r\n\tcharset="ISO-8859-1"; name=a', b"W=F6rld", "QUOTED-PRINTABLE"),
    encoded("text/plain; charset=utf-16", b"//5IAGkA", "base64"),
    encoded("text/html; charset=us-ascii", b"<html><head><title>a</title></head><body>\r\n<p>b"),
    encoded("text/html; charset=us-ascii", b'<HTML><BODY\r\n class="a" bgcolor=red><div><div>b</div></div></BODY>'),
    encoded("text/html; charset=us-ascii", b"<p>no body</p>"),
    encoded("text/html; charset=us-ascii", b'<!-- <body> --><body title="a>b">c'),
    encoded("text/html; charset=us-ascii", b"<!DOCTYPE html><body title=\"a<b>\" id='<p>'>c"),
    encoded("text/html; charset=iso-8859-1", "<body>Wörld &amp; <pre>\r\n\r\n</pre>".encode("latin-1"), "8bit"),
    encoded("text/html; charset=utf-8", b"PGh0bWw+CjxwPkhlbGxvPC9wPgo=", "base64"),
]
SUBJECTS = {
    "plain": "A test",
    "markup": '</pre></div> <b>&amp; "q" it\'s',
    "encoded": "=?iso-8859-1?Q?Gr=FC=DFe?= =?utf-8?B?w6A=?=\r\n all",
    "another alphabet": "=?utf-8?B?zpHOuM6uzr3OsQ==?=",
    "raw": "Grüße",
    "folded": "word\r\n\tword " * 200 + "end",
    "long": "word " * 300 + "end",
    "lines": "=?utf-8?Q?one=0D=0A=0D=0A_two=0A=0Athree?=",
    "no charset": "=?x-unheard-of?Q?a?= b",
}


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_every_text_shows_every_subject(subject: str, protect: Protect) -> None:
    body = b"".join(b"--=_b\r\n%b\r\n" % text for text in TEXTS) + b"--=_b--\r\n"
    source = letter('Content-Type: multipart/alternative; boundary="=_b"\r\n\r\n', Subject=subject) + body
    assert all(leaf.element for leaf in protect(source, "--sign --encrypt")[2].leaves)


def test_a_control_character_in_unicode_keeps_no_subject_out(protect: Protect) -> None:
    text = encoded("text/plain; charset=utf-8", "it\u00e2\u0080\u0099s\u0085".encode(), "8bit")
    assert [leaf.element for leaf in protect(letter(text.decode()), "--encrypt")[2].leaves] != [""]


def test_windows_1252_that_is_called_latin_1_stays_as_it_is(run: Run, openssl: Openssl, authority: Authority) -> None:
    text = b"5 \x80 \x93now\x94\r\n"
    data = mail(b"", MIME_Version="1.0")[:-2] + encoded("text/plain; charset=iso-8859-1", text, "8bit")
    done = run("-", "--encrypt", "--protect_headers", data=data)
    payload = message_from_bytes(openssl.decrypt(inner(done.stdout), authority.identity(STEVET)))
    assert (payload.get_param("charset"), payload.get_param("hp-legacy-display")) == ("iso-8859-1", None)
    assert payload.get_payload(decode=True) == text


@pytest.mark.parametrize("subject", [None, "", "[...]"])
def test_no_element_where_the_subject_does_not_change(subject: str | None, protect: Protect) -> None:
    assert [leaf.element for leaf in protect(letter(TEXT, Subject=subject), "--encrypt")[2].leaves] == [""]


# ------------------------------------------------------------------------------------- what the input claims itself

CLAIMS = [
    "text/plain; hp=cipher",
    'TEXT/plain;hp="clear";HP=cipher; charset=us-ascii',
    "text/plain; hp*0=ci; hp*1=pher",
    "text/plain; hp*=us-ascii''cipher; charset=us-ascii",
    'text/plain;\r\n\tHp = "cipher"; name="; hp=clear"; hp-legacy-display="1"',
]


@pytest.mark.parametrize("mode", ["--sign", "--encrypt"])
@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_of_the_input_are_not_believed(claim: str, mode: str, protect: Protect) -> None:
    fields = {"Content_Type": claim, "HP_Outer": "Subject: A test", "hp_outer": "From: a@b.c"}
    assert b"A test" in protect(mail(b"Hello\r\n\r\nSteve\r\n", **fields), mode)[1]


def test_a_comment_hides_no_protection(run: Run) -> None:
    data = mail(Content_Type="text/plain (a; b); charset=us-ascii")
    signed = message_from_bytes(run("-", "--sign", "--protect_headers", data=data).stdout, policy=default)
    (part, _) = signed.iter_parts()
    assert dict(part["Content-Type"].params) == {"hp": "clear", "charset": "us-ascii"}


@pytest.mark.parametrize("parts", [1, 2])
def test_no_part_claims_an_element_that_it_does_not_have(parts: int, protect: Protect) -> None:
    content = entity("a\r\n\r\nb", 'text/plain; hp-legacy-display="1"')
    source = letter(multipart("mixed", content, content) if parts == 2 else content, Subject=None)
    assert [leaf.shown for leaf in protect(source, "--encrypt")[2].leaves] == ["a\n\nb"] * parts


def test_parameters_that_nobody_can_read_are_no_fault_of_the_program(run: Run) -> None:
    done = run("-", "--protect_headers", "--encrypt", data=mail(Content_Type="text/plain; a*=''b; a*0=c"))
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- the reader refuses

OUTER = (
    b"From: Ann <ann@a.example>\r\nTo: b@b.example\r\nSubject: [...]\r\nCc: mallory@m.example\r\nMIME-Version: 1.0\r\n"
)
PAYLOAD = """From: Ann <ann@a.example>
To: b@b.example
Subject: True
Keywords: one, two
HP-Outer: From: Ann <ann@a.example>
HP-Outer: To: b@b.example
HP-Outer: Subject: [...]
Content-Type: text/plain; hp="cipher"; hp-legacy-display="1"

Subject: True

Hello

Steve
"""
HP, SUBJECT, MARK = 'hp="cipher"', "HP-Outer: Subject: [...]", '; hp-legacy-display="1"'
SIGNED_ONLY = dict.fromkeys(["from", "to", "subject", "keywords"], "signed-only")
STATES = SIGNED_ONLY | {"subject": "signed-and-encrypted", "keywords": "signed-and-encrypted"}
UNPROTECTED = dict.fromkeys(["from", "to", "subject", "cc"], "unprotected")


def read(old: str = "", new: str = "", *, encrypted: bool = True, signer: str = "ann@a.example") -> Rendered:
    assert old in PAYLOAD
    return render(OUTER, PAYLOAD.replace(old, new, 1).encode(), encrypted=encrypted, signer=signer)


def states(rendered: Rendered) -> dict[str, str]:
    return {field.name: field.state for field in rendered.fields}


REFUSED = [
    (HP, "x=y", "HP-Outer where", UNPROTECTED),
    (HP, "hp=secret", "hp is", UNPROTECTED),
    (HP, 'hp="cipher"; hp="cipher"', "hp is", UNPROTECTED),
    (HP, "hp*=''cipher; hp=clear", "hp is", UNPROTECTED),
    (HP, "hp=clear", "hp is ['clear'], encrypted is True", SIGNED_ONLY),
    (SUBJECT, "HP-Outer: Subject", "malformed", STATES),
    (SUBJECT, "HP-Outer: Sub ject: [...]", "malformed", STATES),
    (SUBJECT, "HP-Outer: Subject:True", "malformed", STATES | {"subject": "signed-only"}),
    (SUBJECT, "HP-Outer: Content-Type: text/plain", "malformed", STATES),
    (SUBJECT, "HP-Outer: Bcc: c@c.example", "bcc is given away", STATES),
    (SUBJECT, "Bcc: c@c.example", "bcc is given away", STATES | {"bcc": "signed-and-encrypted"}),
    (SUBJECT, f"{SUBJECT}\nHP-Outer: subject: True", "subject twice", STATES | {"subject": "signed-only"}),
    (SUBJECT, "Subject: Another", "subject twice", STATES),
    (MARK, '; hp-legacy-display="2"', "hp-legacy-display is", STATES),
    (MARK, MARK + "\nContent-Disposition: attachment", "hp-legacy-display is", STATES),
    ("\n\nHello\n\n", "\n", "no legacy display element", STATES),
    ("", "", "", STATES),
    (SUBJECT, "HP-Outer:\n\tSubject:\n [...]", "", STATES),
    (SUBJECT, "hp-outer: SUBJECT: True", "", STATES | {"subject": "signed-only"}),
    (SUBJECT, "X-Empty:\nHP-Outer: X-Empty:", "", STATES | {"x-empty": "signed-only"}),
    (MARK, "", "", STATES),
]


@pytest.mark.parametrize(("old", "new", "complaint", "wanted"), REFUSED)
def test_the_reader_refuses(old: str, new: str, complaint: str, wanted: dict[str, str]) -> None:
    rendered = read(old, new)
    assert [complaint in text for text in rendered.complaints[:1]] == [True] * bool(complaint)
    assert states(rendered) == wanted
    assert not any(is_structural(name) for name, _ in rendered.outer)
    assert rendered.leaves[0].shown.startswith("Hello") == (
        "no legacy" not in complaint and (old != MARK or MARK in new)
    )


def test_the_reader_knows_what_was_not_encrypted_or_signed() -> None:
    bare = read(encrypted=False)
    assert states(bare) == SIGNED_ONLY
    assert len(bare.complaints) == 3  # hp, HP-Outer and hp-legacy-display mean nothing here
    assert (bare.outer, bare.leaves[0].element) == ([], "")
    assert [*states(read(signer="")).values()] == ["unprotected"] * 2 + ["encrypted-only"] * 2


def test_the_reader_ignores_claims_outside_the_payload() -> None:
    payload = multipart("mixed", PAYLOAD.replace("\n", "\r\n")).encode()
    rendered = render(OUTER + b"HP-Outer: To: x\r\n", payload, encrypted=True, signer="ann@a.example")
    assert states(rendered) == UNPROTECTED
    assert rendered.complaints == ["hp where it is ignored", "HP-Outer where it is ignored"]
    assert not render(OUTER, b"Content-Type: message/rfc822\n\n" + PAYLOAD.encode(), encrypted=True).complaints


@pytest.mark.parametrize(
    ("author", "signer", "shown"),
    [
        ("Eve <eve@a.example>", "", "Ann <ann@a.example>"),
        ("Eve <eve@a.example>", "ann@a.example", "Ann <ann@a.example>"),
        ("Eve <eve@a.example>", "Eve@A.example", "Eve <eve@a.example>"),
        ("Other Name <ANN@A.Example>", "", "Other Name <ANN@A.Example>"),
    ],
)
def test_the_reader_warns_of_a_from_that_nobody_vouches_for(author: str, signer: str, shown: str) -> None:
    rendered = read("From: Ann <ann@a.example>", f"From: {author}", signer=signer)
    assert [field.value for field in rendered.fields if field.name == "from"] == [shown]
    assert [text[:4] for text in rendered.complaints] == ["From"] * (shown != author)


DIV = '<div class="a header-protection-legacy-display">'
HTMLS = [
    (f"<body>a{DIV}b</div>c", "<body>ac"),
    (f"<body>\n<p>\n{DIV}<div>b</div></div\n>c</div>", "<body>\n<p>\nc</div>"),
    (f"{DIV}b</DIV>c{DIV}d</div>", f"c{DIV}d</div>"),
    (f"<!-- {DIV}b</div> -->c", ""),
    (DIV.replace("display", "display2") + "b</div>", ""),
    (f"{DIV}<div>b</div>", ""),
]


@pytest.mark.parametrize(("html", "shown"), HTMLS)
def test_the_reader_strips_one_element_of_html(html: str, shown: str) -> None:
    for mark in "12":
        payload = entity(html, f"text/html; hp=cipher; hp-legacy-display={mark}").encode()
        rendered = render(b"To: a@b.c\r\n", payload, encrypted=True)
        assert rendered.leaves[0].shown == (shown if shown and mark == "1" else html)
        assert bool(rendered.complaints) == (not shown or mark == "2")
