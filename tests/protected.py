"""What a mail reader that knows header protection (RFC 9788) shows of a message that was decrypted and verified."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from email import message_from_bytes, message_from_string
from email.header import decode_header, make_header
from email.message import Message
from email.utils import collapse_rfc2231_value, getaddresses
from html.parser import HTMLParser
from typing import NamedTuple

Field = tuple[str, str]  # the name in lower case, and the value unfolded
ADDRESSES = {"from", "sender", "reply-to", "to", "cc", "bcc", "resent-bcc"}
ONCE = ADDRESSES | {"subject", "date", "message-id", "in-reply-to", "references", "mime-version"}  # RFC 5322 3.6
ONCE |= {"content-type", "content-transfer-encoding", "content-disposition"}


class Shown(NamedTuple):
    name: str
    value: str
    state: str  # unprotected, signed-only, encrypted-only or signed-and-encrypted: section 4.3


class Leaf(NamedTuple):
    """A part of text: as it came, the legacy display element in it, and what is left to show."""

    part: Message
    text: str
    element: str
    shown: str


class Rendered(NamedTuple):
    protection: str  # clear, cipher or none
    fields: list[Shown]
    outer: list[Field]  # that the composer says stood outside
    leaves: list[Leaf]
    complaints: list[str]  # what no composer may do, and what a user is warned of


def render(message: bytes, payload: bytes, *, encrypted: bool, signer: str = "") -> Rendered:
    """Show the payload, which signature and encryption protected, of the message, of which only the header counts.

    `signer` is the address that a valid signature is bound to.
    """
    complaints: list[str] = []
    root, inside = message_from_bytes(payload), fields_of(payload)
    outside = [field for field in fields_of(message) if not is_structural(field[0])]
    values = parameters(root, "hp")
    protection = values[0] if values in (["clear"], ["cipher"]) else ""  # section 4.1
    if values and protection != ("cipher" if encrypted else "clear"):
        complaints.append(f"hp is {values}, encrypted is {encrypted}")
    hidden = encrypted and protection == "cipher"  # section 10.2
    records = [value for name, value in inside if name == "hp-outer"]
    outer = list(outer_fields(records, complaints)) if hidden else []
    protected = [field for field in inside if field[0] != "hp-outer" and not is_structural(field[0])]
    if protection:
        fields = [Shown(*field, protection_state(field, outer, hidden, bool(signer))) for field in protected]
        authors = [mailboxes(header) for header in (protected, outside)]
        if authors[0] != authors[1] and mailboxes([("from", signer)]) != authors[0]:  # section 4.4
            complaints.append(f"From is {authors[0]} inside, {authors[1]} outside")
            fields = [field for field in fields if field.name != "from"]
            fields += [Shown(*field, "unprotected") for field in outside if field[0] == "from"]
    else:
        fields = [Shown(*field, "unprotected") for field in outside if field[0] != "hp-outer"]
    for header in (inside, outer, outside):
        names = [name for name, _ in header]
        complaints += [f"{name} twice" for name in ONCE if names.count(name) > 1]
        complaints += [f"{name} is given away" for name in names if name in ("bcc", "resent-bcc")]
    parts = list(walk(root))[1:]
    if any(parameters(part, "hp") for part in parts):
        complaints.append("hp where it is ignored")
    if (records and not hidden) or "hp-outer" in dict(outside) or any("hp-outer" in part for part in parts):
        complaints.append("HP-Outer where it is ignored")  # section 2.2
    leaves = [leaf(part, encrypted, complaints) for part in walk(root) if part.get_content_maintype() == "text"]
    return Rendered(protection, fields, outer, leaves, complaints)


def fields_of(entity: bytes) -> list[Field]:
    head = re.split(rb"(?:\A|\r?\n)\r?\n", entity, maxsplit=1)[0].decode()
    fields = message_from_string(head + "\n\n").items()
    return [(name.lower(), re.sub(r"\r?\n(?=[ \t])", "", value).strip()) for name, value in fields]


def is_structural(name: str) -> bool:
    return name.lower() == "mime-version" or name.lower().startswith("content-")


def parameters(part: Message, name: str) -> list[str]:
    """Every value of this parameter of Content-Type."""
    found = part.get_params([])[1:]
    return [collapse_rfc2231_value(value) for key, value in found if key.strip().lower() == name]


def outer_fields(records: Iterable[str], complaints: list[str]) -> Iterator[Field]:
    """The values of HP-Outer, split at the first colon (section 4.2.1); a blank must follow it (section 2.2.1)."""
    for record in records:
        match = re.fullmatch(r"([!-9;-~]+):( |\Z|)[ \t]*([\t -~]*)", record)
        if not match or (match[3] and not match[2]) or is_structural(match[1]):
            complaints.append(f"HP-Outer is malformed: {record}")
        if match and not is_structural(match[1]):
            yield match[1].lower(), match[3]


def protection_state(field: Field, outer: list[Field], hidden: bool, signed: bool) -> str:
    """HeaderFieldProtection of section 4.3.1."""
    if hidden and field not in outer:
        return "signed-and-encrypted" if signed else "encrypted-only"
    return "signed-only" if signed else "unprotected"


def mailboxes(fields: Iterable[Field]) -> list[str]:
    """The addresses in From, as section 4.4.5 compares them."""
    found = [address for name, value in fields if name == "from" for _, address in getaddresses([value])]
    split = [address.lower().rpartition("@") for address in found]
    return [f"{local}@{domain.encode('idna').decode()}" for local, _, domain in split]


def readable(name: str, value: str) -> object:
    """What a user sees of a field: text, or names with addresses."""
    if name in ADDRESSES:
        return [(readable("", words), address) for words, address in getaddresses([value])]
    with suppress(LookupError):
        value = str(make_header(decode_header(value)))
    return " ".join(value.split())


def walk(part: Message) -> Iterator[Message]:
    """The part and the parts in it, but none of a message attached or signed on its own."""
    yield part
    if part.get_content_maintype() == "multipart" and part.get_content_subtype() != "signed":
        for child in part.get_payload():
            if isinstance(child, Message):
                yield from walk(child)


def text_of(part: Message) -> str:
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)
    return content.decode(part.get_content_charset("us-ascii")).replace("\r\n", "\n")


def leaf(part: Message, encrypted: bool, complaints: list[str]) -> Leaf:
    """A part of text, the legacy display element found as section 4.5.3 has it."""
    kind, marks, text = part.get_content_type(), parameters(part, "hp-legacy-display"), text_of(part)
    marked = encrypted and marks == ["1"] and kind in ("text/plain", "text/html")
    if marks and (not marked or part.get_content_disposition() == "attachment"):
        complaints.append(f"hp-legacy-display is {marks} in {kind}, encrypted is {encrypted}")
    start, end = 0, 0
    if marked and kind == "text/plain":
        end = len(text.partition("\n\n")[0]) + 2 if "\n\n" in text else 0
    elif marked:
        finder = Finder(text)
        start, end = finder.start, finder.end
    if marked and not end:
        complaints.append("no legacy display element where there should be one")
    return Leaf(part, text, text[start:end], text[:start] + text[end:])


class Finder(HTMLParser):
    """Where a body begins in HTML, and where its first <div> of this class begins and ends."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.depth, self.body, self.start, self.end = text, 0, 0, 0, 0
        self.feed(text)

    def place(self) -> int:
        row, column = self.getpos()
        return sum(len(line) + 1 for line in self.text.split("\n")[: row - 1]) + column

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self.body = self.place() + len(self.get_starttag_text() or "")
        if tag == "div" and not self.end:
            begins = "header-protection-legacy-display" in (dict(attrs).get("class") or "").split()
            if begins and not self.depth:
                self.start = self.place()
            self.depth += bool(begins or self.depth)

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.depth:
            self.depth -= 1
            if not self.depth:
                self.end = self.text.index(">", self.place()) + 1
