#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["cryptography>=50.0", "python-dotenv>=1.0"]
# ///
"""Sign and encrypt an e-mail message with S/MIME; print it, or inject it by SMTP or the SparkPost API.

The way of a message, top to bottom in this file:

    command line + environment -> Options, Settings
    message file -> header fields + MIME entity -> Envelope
    key folder -> Signer, and a certificate for every recipient
    entity -> made fit for transport -> signed entity -> encrypted entity     (bytes in, bytes out)
    header fields + entity -> transport.deliver(message, envelope) -> Receipt -> report, exit code

Nothing leaves before every step ahead of it has succeeded, and nothing leaves less protected than was asked.

S/MIME hides and seals the body: the text, its markup and its attachments. It does not hide From, To, Cc, Subject,
Date or any other header field, nor the size of a message, nor that it was sent.

Followed here: RFC 8551 and 8550 (S/MIME 4.0), 5652 (CMS), 5322 and 2045-2047, 2231 (messages), 5321, 6531 and
3207 (SMTP, international addresses, STARTTLS).

Exit codes: 0, every recipient was accepted; 1, something was refused or is wrong; 2, the command line is wrong;
75, a temporary failure: the same command may succeed later.

Modules that take long to load are imported where they are used, so that --help answers at once and a run
loads nothing but its own transport; the types are NamedTuples, since dataclasses alone would double that time.
"""

from __future__ import annotations

import argparse
import os
import re
import stat
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

if TYPE_CHECKING:
    import smtplib
    import ssl
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

# ---------------------------------------------------------------------------------------------------- constants

PROGRAM = "sparkpostSMIME.py"
VERSION = "1.0.0"
EXIT_OK, EXIT_FAILED, EXIT_TEMPORARY = 0, 1, 75  # 75 is EX_TEMPFAIL: a mail server's pipe tries again later
TIMEOUT = 60  # seconds, for each step of a dialogue on the network
LONGEST_LINE = 998  # bytes before CRLF, RFC 5322 section 2.1.1
LONGEST_REPLY = 1_000_000  # bytes of an API reply that are read
DEEPEST_NESTING = 100  # MIME parts in parts; Postfix stops there too
STARS = "*" * 40

ADDRESS_FIELDS = {"from", "sender", "reply-to", "to", "cc", "bcc"}
ADDRESS_FIELDS |= {f"resent-{name}" for name in ADDRESS_FIELDS} | {"disposition-notification-to", "errors-to"}
FIELD_TYPES = {"message/delivery-status", "message/disposition-notification"}  # their body is fields, RFC 3464, 8098
PARAMETER_FIELDS = {"content-type", "content-disposition"}
DROPPED_FIELDS = {"bcc", "resent-bcc", "return-path", "content-length"}

# ------------------------------------------------------------------------------------------------------- errors


class Error(Exception):
    """What a user or a server caused, told in one line: what is wrong, and a hint that names the cure.

    `prefix` is empty only for the lines that users know word for word.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "", *, prefix: str = f"{PROGRAM}: ") -> None:
        self.text = f"{message} - {hint}" if hint else message
        super().__init__(prefix + self.text)


class TemporaryError(Error):
    """A failure that may be gone when the same command runs again."""

    exit_code = EXIT_TEMPORARY


# -------------------------------------------------------------------------------------------------------- types


class Options(NamedTuple):
    """The command line."""

    file: str
    sign: bool
    encrypt: bool
    opaque: bool
    send_smtp: bool
    send_api: bool
    keys: str
    env_file: str | None
    return_path: str | None
    date_now: bool


class Settings(NamedTuple):
    """The environment; holds secrets, which its repr hides."""

    smtp_host: str
    smtp_port: int
    smtp_user: str
    smtp_password: str
    smtp_tls: str
    smtp_ca_file: str
    api_key: str
    api_host: str
    key_password: str

    def __repr__(self) -> str:
        return f"Settings({self.smtp_host}:{self.smtp_port}, {self.api_host})"


class Envelope(NamedTuple):
    """Who a message comes from and who gets it (RFC 5321), as spelt in its header."""

    sender: str
    recipients: tuple[str, ...]
    hidden: tuple[str, ...] = ()  # recipients that only the Bcc field names


class Signer(NamedTuple):
    """A private key, the certificate that belongs to it, and the certificates above that one."""

    key: RSAPrivateKey | EllipticCurvePrivateKey
    certificate: Certificate
    chain: tuple[Certificate, ...]


class Receipt(NamedTuple):
    """What became of one message: recipients accepted, and the answers about those who were not."""

    accepted: int
    answers: tuple[str, ...] = ()
    temporary: bool = False  # the answers ask to try again later


class Transport(Protocol):
    """Where messages go. `banner` tells the user what was opened."""

    banner: tuple[str, ...]

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt: ...

    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------ configuration


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Read the command line; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Sign and encrypt an e-mail message with S/MIME, then print it, or inject it by SMTP or the "
        "SparkPost API.",
        epilog="Exit codes: 0 every recipient accepted; 1 something was refused or is wrong; 2 wrong command line; "
        "75 temporary failure, try again later. Variables are read from the environment, then from --env_file.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=100),
        allow_abbrev=False,
    )
    add, flag = parser.add_argument, "store_true"
    add("file", metavar="FILE.eml", help="The message to send; - reads it from standard input.")
    add("--sign", action=flag, help="Sign with the private key in ADDRESS.pem, ADDRESS being that of the From field.")
    add("--encrypt", action=flag, help="Encrypt for every recipient, with the certificate in ADDRESS.crt of each.")
    add("--opaque", action=flag, help="With --sign, wrap the text into the signature, where no server can alter it.")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--send_smtp",
        action=flag,
        help="Send to the server in SMTP_HOST; SMTP_PORT, SMTP_USER, SMTP_PASSWORD, SMTP_TLS and SMTP_CA_FILE say how.",
    )
    way.add_argument(
        "--send_api",
        action=flag,
        help="Send through the SparkPost API, with the key in SPARKPOST_API_KEY, to the host in SPARKPOST_HOST.",
    )
    add("--keys", metavar="DIR", default=".", help="Look for key files in this folder, not in the current one.")
    add("--env_file", metavar="FILE", help="Read variables from this file, not from my_envs.sh in the current folder.")
    add("--return_path", metavar="ADDRESS", help="Have bounces sent to this address; <> asks for none.")
    add("--date_now", action=flag, help="Replace the Date field by the present time.")
    add("--version", action="version", version=f"{PROGRAM} {VERSION}", help="Print the version.")
    arguments = parser.parse_args(argv)
    if arguments.opaque and not arguments.sign:
        parser.error("--opaque is a way to sign: add --sign")
    return Options(**vars(arguments))


def read_environment(environ: Mapping[str, str], env_file: str | None) -> Mapping[str, str]:
    """The variables of the environment, and below them those of the settings file, which is never executed.

    Raises Error for a file that cannot be read, or that other users could read or write.
    """
    if env_file is None and not os.path.exists("my_envs.sh"):
        return environ
    import io
    import logging

    from dotenv import dotenv_values

    path = env_file or "my_envs.sh"
    logging.basicConfig(format=f"{PROGRAM}: {path}: %(message)s")  # how python-dotenv tells of lines it cannot read
    try:
        content = read_guarded(path, owned=True).decode()
    except UnicodeDecodeError:
        raise Error(f"{path}: this settings file is not UTF-8 text") from None
    values = dotenv_values(stream=io.StringIO(content), interpolate=False)
    return {name: value for name, value in values.items() if value} | dict(environ)


def read_settings(environ: Mapping[str, str], options: Options) -> Settings:
    """Check the variables that this run needs, before anything else is read. Raises Error."""
    if options.send_smtp:
        require(environ, "SMTP_HOST")
    if options.send_api:
        require(environ, "SPARKPOST_API_KEY")
    for name in ("SMTP_HOST", "SMTP_USER", "SMTP_PASSWORD", "SPARKPOST_API_KEY"):
        if not re.fullmatch(r"[ -~]*", environ.get(name, "")):
            raise Error(f"{name} holds a line break or a character outside ASCII", "set it anew")
    port = environ.get("SMTP_PORT") or "25"
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise Error(f"SMTP_PORT is {port!r}", "it must be a number from 1 to 65535")
    tls = environ.get("SMTP_TLS") or "auto"
    if tls not in ("auto", "verify", "off"):
        raise Error(f"SMTP_TLS is {tls!r}", "it must be auto, verify or off")
    return Settings(
        smtp_host=environ.get("SMTP_HOST", ""),
        smtp_port=int(port),
        smtp_user=environ.get("SMTP_USER", ""),
        smtp_password=environ.get("SMTP_PASSWORD", ""),
        smtp_tls=tls,
        smtp_ca_file=environ.get("SMTP_CA_FILE", ""),
        api_key=environ.get("SPARKPOST_API_KEY", ""),
        api_host=api_url(environ.get("SPARKPOST_HOST") or "https://api.sparkpost.com"),
        key_password=environ.get("SMIME_KEY_PASSWORD", ""),
    )


def require(environ: Mapping[str, str], name: str) -> None:
    if not environ.get(name):
        raise Error(f"Environment var {name} not set - stopping", prefix="")


def api_url(host: str) -> str:
    """The base of the API's address. Raises Error for one that would send the key in the clear."""
    url = re.fullmatch(r"(?:(https?)://)?([\w.-]+|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?/?", host)
    if not url:
        raise Error(f"SPARKPOST_HOST is {host!r}", "it must be like https://api.eu.sparkpost.com")
    scheme, name, port = url[1] or "https", url[2], url[3] or ""
    if scheme == "http" and not is_loopback(name.strip("[]")):
        raise Error(f"SPARKPOST_HOST is {host!r}, which would send the API key unencrypted", f"use https://{name}")
    return f"{scheme}://{name}{port}"


def is_loopback(host: str) -> bool:
    """Whether this host name or numeric address never leaves the machine."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", host) is not None


def read_guarded(path: str, *, owned: bool = False) -> bytes:
    """Read a file of secrets. Raises Error when it cannot be read, or when others than its owner could."""
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        if owned and status.st_uid != os.geteuid():
            raise Error(f"{path}: this file belongs to another user", f"chown {os.geteuid()} {path}")
        if stat.S_IMODE(status.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
            mode = "0700" if status.st_mode & stat.S_IXUSR else "0600"
            raise Error(f"{path}: other users can read or change this file", f"chmod {mode} {path}")
        return file.read()


def open_file(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from None


# ------------------------------------------------------------------------------------- message: fields, envelope

CRLF = b"\r\n"
QUOTED = r'"(?:[^"\\]|\\.)*"'
ATOM = r'[^\s\x00-\x20\x7f"(),:;<>@\[\\\]]+'
FIELD = re.compile(rb"(?:>?From [^\n]*\n)*([!-9;-~]+[ \t]*:[^\n]*(?:\n[ \t][^\n]*)*)(?:\n|\Z)")
ITEM = re.compile(rf'((?:{QUOTED}|<(?:{QUOTED}|[^<>"])*>|\[[^\[\]]*\]|[^"<>\[\],;:])*)([,;:]|\Z)', re.DOTALL)
ADDRESS = re.compile(rf"(?:{QUOTED}|{ATOM})@(?:{ATOM}|\[[!-Z^-~]+\])", re.DOTALL)
BRACKETED = re.compile(rf'(?:{QUOTED}|[^"<>])*<(?:@[^:<>]*:)?((?:{QUOTED}|[^<>"])*)>', re.DOTALL)


def read_message(path: str) -> bytes:
    """The bytes of a message file, or of standard input for `-`. Raises Error."""
    if path == "-":
        return sys.stdin.buffer.read()
    with open_file(path) as file:
        return file.read()


def split_entity(entity: bytes) -> tuple[list[bytes], bytes, bytes]:
    """Cut an entity into header fields, the blank line after them, and body.

    The fields are folded with CRLF and lack the last one, the body stays as it came. The header ends at the first line
    that is no field (RFC 5322 section 2.1); mbox "From " lines before a field are dropped.
    """
    fields, end = [], 0
    while match := FIELD.match(entity, end):
        fields.append(to_crlf(match[1].rstrip(b"\r")))
        end = match.end()
    blank = re.compile(rb"\r?\n").match(entity, end)
    start = blank.end() if blank else end
    return fields, CRLF if blank or start < len(entity) else b"", entity[start:]


def to_crlf(data: bytes) -> bytes:
    """Make CRLF of every line end, be it CRLF or LF."""
    if data.count(b"\n") == data.count(CRLF):
        return data
    return data.replace(CRLF, b"\n").replace(b"\n", CRLF)


def to_text(raw: bytes) -> str:
    """Read bytes as UTF-8, else as Latin-1, which never fails."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def field_name(field: bytes) -> str:
    return field.partition(b":")[0].strip().lower().decode()


def field_texts(fields: Iterable[bytes], name: str) -> list[str]:
    """The values of all fields of that name, unfolded (RFC 5322 section 2.2.3)."""
    found = [field for field in fields if field_name(field) == name]
    return [to_text(field.partition(b":")[2].replace(CRLF, b"")).strip() for field in found]


def read_envelope(fields: Sequence[bytes], return_path: str | None) -> Envelope:
    """Who the message comes from, and every address of To, Cc and Bcc, each once.

    Resent- fields tell of an earlier journey (RFC 5322 section 3.6.6), so they name no recipients. Raises Error.
    """
    sender = author(fields, "sender", "from")
    if return_path is not None:
        sender = "" if return_path in ("", "<>") else parse_address(return_path, "--return_path")
    shown = {address_key(address): address for address in reversed(addresses(fields, "to", "cc"))}
    hidden = {address_key(address): address for address in reversed(addresses(fields, "bcc"))}
    if not shown and not hidden:
        raise Error("the message has no recipient", "name one in a To, Cc or Bcc field")
    only_hidden = [hidden[key] for key in hidden if key not in shown]
    return Envelope(sender, tuple(reversed(shown.values())), tuple(reversed(only_hidden)))


def address_key(address: str) -> str:
    """Equal for two spellings of one mailbox: only domains disregard case (RFC 5321 section 2.4)."""
    local, at, domain = address.rpartition("@")
    return local + at + domain.lower()


def author(fields: Sequence[bytes], *names: str) -> str:
    """The address in the first of these fields, From or Sender, that holds exactly one. Raises Error.

    Several authors in From need a Sender (RFC 5322 section 3.6.2).
    """
    if not addresses(fields, "from"):
        raise Error("the message has no sender", "name one in a From field")
    for name in names:
        found = addresses(fields, name)
        if len(found) == 1:
            return found[0]
    raise Error("the From field names several addresses", "add a Sender field with the one that sends")


def addresses(fields: Iterable[bytes], *names: str) -> list[str]:
    """The addresses in all fields of these names, in order, groups dissolved (RFC 5322 section 3.4).

    The standard library's two parsers lose or invent recipients in lists that are slightly wrong, each Python
    version in its own way, and do not tell; this one takes every address or raises Error.
    """
    found = []
    for name in names:
        for value in field_texts(fields, name):
            position, text = 0, without_comments(value, name)
            while position < len(text):
                item = ITEM.match(text, position)
                if not item:
                    raise unreadable(text[position:], name)
                position = item.end()
                if item[2] != ":" and item[1].strip():  # the text before a colon is the name of a group
                    found.append(parse_address(item[1].strip(), name))
    return found


def parse_address(mailbox: str, name: str) -> str:
    """The address in `Name <address>` or `address`. Raises Error."""
    bracketed = BRACKETED.fullmatch(mailbox)
    address = (bracketed[1] if bracketed else mailbox).strip()
    if not ADDRESS.fullmatch(address) or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", mailbox):
        raise unreadable(mailbox, name)
    return address


def unreadable(text: str, name: str) -> Error:
    return Error(f"the {name} field holds an address that cannot be read: {text[:80]!r}", "write Name <user@domain>")


def without_comments(text: str, name: str) -> str:
    """Drop (comments), which nest, but not in quoted strings (RFC 5322 section 3.2.2). Raises Error."""
    depth, kept = 0, []
    for token in re.findall(rf'{QUOTED}|\\.|[()]|[^"\\()]+|.', text, re.DOTALL):
        if token == "(":
            depth += 1
        elif token == ")" and depth:
            depth -= 1
        elif not depth:
            kept.append(token)
    if depth:
        raise unreadable(text, name)
    return "".join(kept)


def wire_address(address: str) -> str:
    """Spell a domain outside ASCII in A-labels (RFC 5890 section 2.3.2.1), which every mail server reads.

    Not by the idna codec: it follows the older RFC 3490 and would send mail for faß.de to fass.de.
    """
    if address.isascii():
        return address
    import unicodedata

    local, at, domain = address.rpartition("@")
    labels = unicodedata.normalize("NFC", domain.lower()).split(".")
    encoded = (label if label.isascii() else "xn--" + label.encode("punycode").decode() for label in labels)
    return local + at + ".".join(encoded)


# ----------------------------------------------------------------------------- message: header fit for transport


def words(excluded: bytes = b"") -> bytes:
    """A pattern for a run of words that hold raw eight-bit text, or for one other word."""
    word = rb"[^\s%b]" % excluded
    raw = rb"%b*[\x80-\xff]%b*" % (word, word)
    return rb"%b(?:\s+%b)*|%b+" % (raw, raw, word)


BYTES_QUOTED = QUOTED.encode()
UNSTRUCTURED = re.compile(words())
ADDRESS_LIST = re.compile(
    rb'(?P<address><[^<>]*>|(?:%b|[^\s"<>(),:;@]+)@[^\s"<>(),;]+)|' % BYTES_QUOTED
    + rb"(?P<quoted>%b)|%b" % (BYTES_QUOTED, words(rb'"<>(),:;')),
    re.DOTALL,
)
PARAMETER = re.compile(rb'(;\s*[^\s;="*]+)\s*=\s*(%b|[^\s;"]+)' % BYTES_QUOTED, re.DOTALL)
ENCODED_WORD = re.compile(rb"=\?[^?\s]+\?[BbQq]\?[^?\s]*\?=")
RAW_ENCODED_WORD = re.compile(rb"=\?([^?\s]+)\?([BbQq])\?([^?\r\n]*[\x80-\xff][^?\r\n]*)\?=")
CONTROLS = re.compile(rb"\0|\r(?!\n)")
LONG_LINE = re.compile(rb"[^\r\n]{%d}" % (LONGEST_LINE + 1))
CALLED_EIGHT_BIT = re.compile(rb"content-transfer-encoding:[ \t\r\n]*(?:8bit|binary)")


def outer_fields(fields: Iterable[bytes], options: Options, domain: str) -> list[bytes]:
    """The fields that stay outside, in order and fit for transport, with those that every message must have."""
    from email.utils import formatdate, make_msgid

    rewritten = options.sign or options.encrypt
    dropped = DROPPED_FIELDS | ({"dkim-signature"} if rewritten else set())  # it signs the body as it was
    outer: list[bytes] = []
    present = set()
    for field in fields:
        name = field_name(field)
        if name in dropped or (rewritten and name.startswith("content-")):
            continue
        if name == "mime-version" and name in present:
            continue
        present.add(name)
        outer.append(fit_field(b"Date: " + formatdate().encode() if name == "date" and options.date_now else field))
    if "date" not in present:
        outer.append(b"Date: " + formatdate(localtime=True).encode())
    if "message-id" not in present:
        outer.append(b"Message-ID: " + make_msgid(domain=wire_address(domain)).encode())
    if "mime-version" not in present:
        outer.append(b"MIME-Version: 1.0")
    return outer


def fit_field(field: bytes) -> bytes:
    """Make a field ASCII, without NUL or a lone CR, in lines of at most 998 bytes; one that is so stays as it is."""
    if not field.isascii() or CONTROLS.search(field):
        name = field_name(field)
        head, colon, value = CONTROLS.sub(b" ", field).partition(b":")
        if name in PARAMETER_FIELDS:
            value = PARAMETER.sub(encode_parameter, value)
        field = head + colon + encode_words(value, ADDRESS_LIST if name in ADDRESS_FIELDS else UNSTRUCTURED)
    return CRLF.join(fold(line) for line in field.split(CRLF))


def fold(line: bytes) -> bytes:
    """Fold a line of more than 998 bytes before the white space in it (RFC 5322 section 2.2.3)."""
    if len(line) <= LONGEST_LINE:
        return line
    return re.sub(rb"(.{0,%d}[^ \t])(?=[ \t])" % (LONGEST_LINE - 1), rb"\1\r\n", line)


def encode_words(value: bytes, token: re.Pattern[bytes]) -> bytes:
    """Turn raw text in a field's value into encoded words (RFC 2047), except in addresses (RFC 6532)."""
    value = RAW_ENCODED_WORD.sub(mend_encoded_word, to_text(value).encode())
    pieces, end, before = [], 0, ""
    for match in token.finditer(value):
        gap, word, kind = value[end : match.start()], match[0], ""
        if word.isascii():
            kind = "old" if ENCODED_WORD.fullmatch(word) else ""
        elif match.lastgroup == "address":
            word = re.sub(rb"[^<>]+", lambda inner: wire_address(inner[0].decode()).encode(), word)
        else:
            word = encoded_words(unquoted(word) if match.lastgroup == "quoted" else word.decode())
            kind = "new"
        if gap.isspace() and {before, kind} in ({"new"}, {"old", "new"}):
            gap += encoded_words(" ") + b" "  # blanks between encoded words are not shown, RFC 2047 section 6.2
        pieces += [gap, word]
        end, before = match.end(), kind
    return b"".join(pieces) + value[end:]


def unquoted(word: bytes) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1].decode(), flags=re.DOTALL)


def encoded_words(text: str) -> bytes:
    """Encoded words of at most 75 bytes, cut between characters (RFC 2047 sections 2 and 5)."""
    from binascii import b2a_base64

    data = re.sub(r"[ \t\r\n]+", " ", text).encode()
    chunks = re.findall(rb".{1,45}(?![\x80-\xbf])", data, re.DOTALL)
    return b"\r\n ".join(b"=?utf-8?B?" + b2a_base64(chunk, newline=False) + b"?=" for chunk in chunks)


def mend_encoded_word(match: re.Match[bytes]) -> bytes:
    """Encode the raw text in an encoded word, in the character set that the word names."""
    charset, encoding, text = match.groups()
    try:
        text = text.decode().encode(charset.decode("ascii"))
    except (LookupError, ValueError):
        pass  # a character set that Python or the text does not know: the bytes stay
    if encoding in b"Bb":
        text = re.sub(rb"[^A-Za-z0-9+/=]", b"", text)
    else:
        text = re.sub(rb"[^!-~]", lambda raw: b"_" if raw[0] == b" " else b"=%02X" % ord(raw[0]), text)
    return b"=?%b?%b?%b?=" % (charset, encoding, text)


def encode_parameter(match: re.Match[bytes]) -> bytes:
    """Encode the raw bytes of a parameter such as filename (RFC 2231 section 4).

    No character set is named, for the message names none: readers go on guessing, as with the raw bytes.
    """
    from urllib.parse import quote_from_bytes

    name, value = match.groups()
    if value.isascii():
        return match[0]
    content = re.sub(rb"\\(.)", rb"\1", value[1:-1], flags=re.DOTALL) if value[:1] == b'"' else value
    return name + b"*=" + quote_from_bytes(content, safe="").encode()


# ----------------------------------------------------------------------------- message: entity fit for transport


def make_entity(fields: Iterable[bytes], body: bytes, *, clear: bool) -> bytes:
    """The MIME entity of a message, its Content- fields and its body, fit for transport.

    `clear` asks for what a clear signature needs on top. Raises Error where that cannot be had.
    """
    content = [f for f in fields if field_name(f).startswith("content-") and field_name(f) not in DROPPED_FIELDS]
    if not field_texts(content, "content-type"):
        content.insert(0, b"Content-Type: text/plain" + guess_charset(body))
    entity = fit_entity(b"".join(field + CRLF for field in content) + CRLF + body, clear=clear)
    return entity


def guess_charset(body: bytes) -> bytes:
    """The charset parameter for text that came without one."""
    if body.isascii():
        return b""
    try:
        body.decode()
    except UnicodeDecodeError:
        return b"; charset=iso-8859-1"
    return b"; charset=utf-8"


def is_fit(entity: bytes, *, clear: bool) -> bool:
    """Whether mail servers carry this entity, whose line ends are CRLF, unaltered (RFC 8551 section 3.1).

    A part that is called 8bit they may re-encode, even if it is ASCII; and under a clear signature they may alter
    "From " at the start of a line and blanks at its end.
    """
    return (
        entity.isascii()
        and b"\0" not in entity
        and entity.count(b"\r") == entity.count(CRLF)
        and not LONG_LINE.match(entity)
        and not re.search(rb"\n" + LONG_LINE.pattern, entity)
        and not CALLED_EIGHT_BIT.search(entity.lower())
        and not (clear and (entity.startswith(b"From ") or b"\nFrom " in entity))
        and not (clear and (entity.endswith((b" ", b"\t")) or b" \r" in entity or b"\t\r" in entity))
    )


def fit_entity(raw: bytes, *, clear: bool, default: str = "text/plain", depth: int = 0) -> bytes:
    """The entity with CRLF line ends; what is unfit for transport in it is re-encoded, part by part.

    A part already signed is left alone. `default` is the type of an entity that names none. Raises Error.
    """
    entity = to_crlf(raw)
    if is_fit(entity, clear=clear):
        return entity
    fields, blank, body = split_entity(raw)
    kind, boundary = media_type(fields, default)
    encoding = transfer_encoding(fields)
    if kind == "multipart/signed":
        if clear:
            raise Error("the message holds a signed part, unfit for a clear signature around it", "use --opaque")
        return entity
    if depth == DEEPEST_NESTING:
        raise Error(f"the message has parts in parts, more than {DEEPEST_NESTING} deep")
    if kind.startswith("multipart/") and boundary:
        inner = "message/rfc822" if kind == "multipart/digest" else "text/plain"  # RFC 2046 section 5.1.5
        body = fit_parts(body, boundary, clear=clear, default=inner, depth=depth + 1)
    elif kind in ("message/rfc822", "message/global") and encoding not in ("base64", "quoted-printable"):
        body = fit_entity(body, clear=clear, depth=depth + 1)
    else:
        encoding, body = fit_leaf(body, kind, encoding, clear=clear)
    encoding = "7bit" if encoding in ("8bit", "binary") else encoding
    header = b"".join(fit_field(field) + CRLF for field in with_transfer_encoding(fields, encoding))
    if clear:
        header = re.sub(rb"[ \t\r\n]+(?=\r\n)", b"", header)
    return header + blank + body


def media_type(fields: Iterable[bytes], default: str) -> tuple[str, str | None]:
    """Type and boundary as the standard library reads them."""
    from email.message import Message

    entity = Message()
    entity.set_default_type(default)
    for value in field_texts(fields, "content-type")[:1]:
        entity["Content-Type"] = value
    return entity.get_content_type(), entity.get_boundary()


def transfer_encoding(fields: Iterable[bytes]) -> str:
    """The Content-Transfer-Encoding, empty where the entity names none."""
    value = "".join(field_texts(fields, "content-transfer-encoding")[:1])
    return re.split(r"[;(]", value)[0].strip().lower()


def with_transfer_encoding(fields: Sequence[bytes], encoding: str) -> list[bytes]:
    """The fields, saying this Content-Transfer-Encoding."""
    if encoding == transfer_encoding(fields):
        return list(fields)
    others = [field for field in fields if field_name(field) != "content-transfer-encoding"]
    return [*others, b"Content-Transfer-Encoding: " + encoding.encode()]


def fit_parts(body: bytes, boundary: str, *, clear: bool, default: str, depth: int) -> bytes:
    """The body of a multipart, each part made fit (RFC 2046 section 5.1.1).

    An unfit preamble or epilogue, which no reader shows, is left out; so are blanks after a boundary.
    """
    delimiter = re.compile(rb"(?:\A|\r?\n)--%b(--)?[ \t]*(?=\r?\n|\Z)" % re.escape(boundary.encode()))
    pieces: list[bytes] = []
    end, inside = 0, False
    for match in delimiter.finditer(body):
        pieces += [fit_piece(body[end : match.start()], inside, clear, default, depth), to_crlf(match[0]).rstrip()]
        end, inside = match.end(), not match[1]
        if not inside:
            break
    return b"".join([*pieces, fit_piece(body[end:], inside, clear, default, depth)])


def fit_piece(piece: bytes, inside: bool, clear: bool, default: str, depth: int) -> bytes:
    """What stands between two boundaries, a part with the line end before it; or before the first, or after the last."""
    if not inside:
        text = to_crlf(piece)
        return text if is_fit(text, clear=clear) else b""
    line_end = re.match(rb"\r?\n", piece)
    return CRLF + fit_entity(piece[line_end.end() :], clear=clear, default=default, depth=depth) if line_end else b""


def fit_leaf(body: bytes, kind: str, encoding: str, *, clear: bool) -> tuple[str, bytes]:
    """Encoding and body of a part that holds no parts, re-encoded where it is unfit; it decodes to the same bytes."""
    is_text = kind.startswith(("text/", "message/"))
    if encoding != "binary" or is_text:  # binary data has no line ends to be made CRLF
        body = to_crlf(body)
        if clear and kind in FIELD_TYPES:  # blanks at their line ends mean nothing, as in a header
            body = re.sub(rb"[ \t]+(?=\r\n|\Z)", b"", body)
        if is_fit(body, clear=clear):
            return encoding, body
    if encoding == "base64":  # what is outside its alphabet has no meaning, RFC 2045 section 6.8
        return encoding, wrap(re.sub(rb"[^A-Za-z0-9+/=]", b"", body))
    body = decoded(body, encoding)
    return ("quoted-printable", quoted_printable(body)) if is_text else ("base64", base64_lines(body))


def decoded(body: bytes, encoding: str) -> bytes:
    """The body as the standard library decodes it; in an encoding that nobody knows it stays as it is."""
    from email.message import Message

    part = Message()
    part["Content-Transfer-Encoding"] = encoding
    part.set_payload(body.decode("ascii", "surrogateescape"))
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else body


def quoted_printable(data: bytes) -> bytes:
    """RFC 2045 section 6.7, for text with line ends of CRLF; keeps "From " off the start of every line."""
    unsafe = rb"[^\t\r\n -<>-~]|\r(?!\n)|(?<!\r)\n|[\t ](?=\r\n|\Z)|F(?=rom )"
    escaped = re.sub(unsafe, lambda match: b"=%02X" % ord(match[0]), data)
    return re.sub(rb"([^\r\n]{1,75}(?<!=)(?<!=[0-9A-F]))(?=[^\r\n])", rb"\1=\r\n", escaped)


def base64_lines(data: bytes) -> bytes:
    """Base64 in lines of 76 characters (RFC 2045 section 6.8), made in pieces to spare memory."""
    from binascii import b2a_base64

    piece = 57 * 1024  # 57 bytes make a line
    pieces = (data[start : start + piece] for start in range(0, len(data), piece))
    return CRLF.join(wrap(b2a_base64(piece, newline=False)) for piece in pieces)


def wrap(text: bytes) -> bytes:
    return CRLF.join(text[start : start + 76] for start in range(0, len(text), 76))


# ------------------------------------------------------------------------------------------------------- keys


def key_file(folder: str, address: str, suffix: str) -> str:
    """The path of an address's key file: spelt as the address is, else in lower case. Raises Error."""
    if "/" in address or address.startswith("."):
        raise Error(f"{address}: an address with / or a leading dot names no key file")
    for name in (address, address.lower()):
        path = os.path.join(folder, name + suffix)
        if os.path.exists(path):
            return path
    raise Error(f"{os.path.join(folder, address + suffix)} not found", "put it there, or name its folder with --keys")


def load_signer(folder: str, address: str, password: str) -> Signer:
    """The key of ADDRESS.pem, with the certificates of that file or else of ADDRESS.crt. Raises Error."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    path = key_file(folder, address, ".pem")
    pem = read_guarded(path)
    key = load_key(path, pem, password)
    if not isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)):
        raise Error(f"{path}: this kind of key cannot sign S/MIME", "use an RSA or elliptic curve (NIST) key")
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        path = key_file(folder, address, ".crt")
        pem = read_message(path)
    certificates = load_certificates(path, pem)
    own = [certificate for certificate in certificates if certificate.public_key() == key.public_key()]
    if not own:
        raise Error(f"{path}: no certificate here belongs to the private key of {address}", "put both in one file")
    check_validity(path, own[0])
    return Signer(key, own[0], tuple(certificate for certificate in certificates if certificate != own[0]))


def load_key(path: str, pem: bytes, password: str) -> object:
    """The private key in PEM text. Raises Error, which never holds what the file holds."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    encrypted = b"-----BEGIN ENCRYPTED" in pem or b"Proc-Type: 4,ENCRYPTED" in pem
    if encrypted and not password:
        raise Error(f"{path}: this key is encrypted", "set SMIME_KEY_PASSWORD")
    try:
        return load_pem_private_key(pem, password.encode() if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        cure = "is SMIME_KEY_PASSWORD right?" if encrypted else "it must hold a private key in PEM form"
        raise Error(f"{path}: no private key can be read from this file", cure) from None


def load_certificates(path: str, pem: bytes) -> list[Certificate]:
    """All certificates in PEM text. Raises Error."""
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return load_pem_x509_certificates(pem)
    except ValueError:
        raise Error(f"{path}: no certificate can be read from this file", "it must be in PEM form") from None


def load_recipient(folder: str, address: str) -> Certificate:
    """The first certificate of ADDRESS.crt, fit to encrypt for. Raises Error."""
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    path = key_file(folder, address, ".crt")
    certificate = load_certificates(path, read_message(path))[0]
    if not isinstance(certificate.public_key(), RSAPublicKey):
        raise Error(f"{path}: the key in this certificate is not RSA", f"ask {address} for an RSA certificate")
    check_validity(path, certificate)
    return certificate


def check_validity(path: str, certificate: Certificate) -> None:
    from datetime import datetime, timezone

    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= datetime.now(timezone.utc) <= end:
        raise Error(f"{path}: this certificate is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}", "get a current one")


def load_keys(
    folder: str, signer: str | None, recipients: Iterable[str], password: str
) -> tuple[Signer | None, dict[str, Certificate]]:
    """The signer, and a certificate for every recipient. Raises one Error that names all that is missing or unusable."""
    problems: list[str] = []
    certificates: dict[str, Certificate] = {}
    identity = None
    try:
        identity = load_signer(folder, signer, password) if signer else None
    except Error as error:
        problems.append(error.text)
    for address in recipients:
        try:
            certificates[address] = load_recipient(folder, address)
        except Error as error:
            problems.append(error.text)
    if problems:
        raise Error("; ".join(problems))
    return identity, certificates


# ------------------------------------------------------------------------------------------------------ S/MIME


def sign(entity: bytes, signer: Signer, *, opaque: bool) -> bytes:
    """A signed entity: multipart/signed (RFC 8551 section 3.5.3), or signed-data if opaque (section 3.5.2)."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

    builder = pkcs7.PKCS7SignatureBuilder().set_data(entity)
    builder = builder.add_signer(signer.certificate, signer.key, SHA256())
    for certificate in signer.chain:  # last: the calls before drop what was added
        builder = builder.add_certificate(certificate)
    if opaque:
        return cms_entity("signed-data", builder.sign(Encoding.DER, [pkcs7.PKCS7Options.Binary]))
    signature = builder.sign(Encoding.DER, [pkcs7.PKCS7Options.Binary, pkcs7.PKCS7Options.DetachedSignature])
    boundary = b"----=_" + os.urandom(16).hex().encode()
    while boundary in entity:
        boundary = b"----=_" + os.urandom(16).hex().encode()
    return b"".join(
        (
            b'Content-Type: multipart/signed; protocol="application/pkcs7-signature";\r\n',
            b'\tmicalg=sha-256; boundary="%b"\r\n\r\n' % boundary,
            b"This message is signed with S/MIME.\r\n",
            b"--%b\r\n" % boundary,
            entity,
            b"\r\n--%b\r\n" % boundary,
            b"Content-Type: application/pkcs7-signature; name=smime.p7s\r\n",
            b"Content-Transfer-Encoding: base64\r\n",
            b"Content-Disposition: attachment; filename=smime.p7s\r\n\r\n",
            base64_lines(signature),
            b"\r\n--%b--\r\n" % boundary,
        )
    )


def encrypt(entity: bytes, certificates: Iterable[Certificate]) -> bytes:
    """An enveloped-data entity that any of these certificates' keys opens (RFC 8551 section 3.3)."""
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

    builder = pkcs7.PKCS7EnvelopeBuilder().set_data(entity).set_content_encryption_algorithm(AES256)
    for certificate in dict.fromkeys(certificates):
        builder = builder.add_recipient(certificate)
    return cms_entity("enveloped-data", builder.encrypt(Encoding.DER, [pkcs7.PKCS7Options.Binary]))


def cms_entity(kind: str, der: bytes) -> bytes:
    """A CMS object as a MIME entity (RFC 8551 section 3.2)."""
    header = (
        f"Content-Type: application/pkcs7-mime; smime-type={kind};\r\n\tname=smime.p7m\r\n"
        "Content-Transfer-Encoding: base64\r\n"
        "Content-Disposition: attachment; filename=smime.p7m\r\n\r\n"
    )
    return header.encode() + base64_lines(der) + CRLF


# -------------------------------------------------------------------------------------------------- transports


class Stdout:
    """Prints messages, with the line ends of the file they came from."""

    banner: tuple[str, ...] = ()

    def __init__(self, line_end: bytes) -> None:
        self.line_end = line_end

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt:
        try:
            with open(1, "wb", closefd=False) as stdout:
                stdout.write(message if self.line_end == CRLF else message.replace(CRLF, self.line_end))
        except OSError as error:
            raise Error(f"standard output: {error.strerror}") from None
        return Receipt(len(envelope.recipients))

    def close(self) -> None:
        pass


class Smtp:
    """Sends messages to an SMTP server, over one connection. Source of the texts it prints: smtplib."""

    def __init__(self, settings: Settings) -> None:
        """Connect, and log in where there is a password. Raises Error."""
        self.settings = settings
        with smtp_errors(settings):
            self.session, security = open_session(settings)
            if settings.smtp_user and settings.smtp_password:
                self.session.login(settings.smtp_user, settings.smtp_password)
        self.banner: tuple[str, ...] = (
            f"Opened SMTP connection ({security})",
            f"Host: {settings.smtp_host}",
            f"Port: {settings.smtp_port}",
            f'User: "{settings.smtp_user}"',
            f'Password: "{STARS if settings.smtp_password else ""}"',
        )

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt:
        """Raises Error when no recipient was accepted."""
        import smtplib

        recipients = [wire_address(recipient) for recipient in envelope.recipients]
        sender = wire_address(envelope.sender)
        options = self.mail_options(message, [sender, *recipients])
        if self.settings.smtp_host.lower().endswith(".sparkpostmail.com"):
            message = untracked(message)
        with smtp_errors(self.settings, self.session):
            try:
                refused = self.session.sendmail(sender, recipients, message, options)
            except smtplib.SMTPRecipientsRefused as error:
                temporary = all(400 <= code < 500 for code, _ in error.recipients.values())
                raise answer_error(str(error), self.settings, temporary=temporary) from None
        answers = (without_secrets(str(refused), self.settings),) if refused else ()
        return Receipt(len(recipients) - len(refused), answers)

    def mail_options(self, message: bytes, addresses: Iterable[str]) -> list[str]:
        """What MAIL FROM must say of the message (RFC 6152, RFC 6531). Raises Error where the server cannot do it."""
        header = message[: message.index(CRLF + CRLF)]
        if not header.isascii() or not all(address.isascii() for address in addresses):
            if not self.session.has_extn("smtputf8"):
                raise Error(
                    f"{self.settings.smtp_host} does not offer SMTPUTF8, which addresses outside ASCII need",
                    "use an address in ASCII, or another server",
                )
            return ["SMTPUTF8", "BODY=8BITMIME"]
        return ["BODY=8BITMIME"] if not message.isascii() and self.session.has_extn("8bitmime") else []

    def close(self) -> None:
        with suppress(OSError):  # smtplib's errors are OSErrors; the messages are accepted or refused by now
            self.session.quit()


def untracked(message: bytes) -> bytes:
    """Ask SparkPost not to rewrite the links, which would break a signature; a header of the user's own stays."""
    if any(field_name(field) == "x-msys-api" for field in split_entity(message)[0]):
        return message
    return b'X-MSYS-API: {"options": {"open_tracking": false, "click_tracking": false}}\r\n' + message


def open_session(settings: Settings) -> tuple[smtplib.SMTP, str]:
    """A session with the server, and how it is secured. Raises Error, and what smtplib and ssl raise.

    A password never crosses a network without verified TLS (RFC 8314 section 3), and never where SMTP_TLS forbids.
    """
    import ssl

    session = greet(settings)
    peer = session.sock.getpeername()[0] if session.sock else ""
    in_danger = bool(settings.smtp_user and settings.smtp_password) and not is_loopback(peer)
    if settings.smtp_tls == "off" or not session.has_extn("starttls"):
        if settings.smtp_tls == "verify":
            raise Error(
                f"{settings.smtp_host} does not offer STARTTLS", "SMTP_TLS=verify demands it; is the port right?"
            )
        if in_danger:
            cure = "unset SMTP_PASSWORD, or " + (
                "SMTP_TLS" if settings.smtp_tls == "off" else "use a port with STARTTLS"
            )
            raise Error(f"{settings.smtp_host}: a password is not sent over a plain connection", cure)
        return session, "plain"
    try:
        session.starttls(context=tls_context(settings.smtp_ca_file))
        return session, "STARTTLS"
    except ssl.SSLCertVerificationError as error:
        if settings.smtp_tls == "verify" or settings.smtp_ca_file or in_danger:
            raise Error(
                f"{settings.smtp_host}: its certificate cannot be verified: {error.verify_message}",
                "name the CA that issued it in SMTP_CA_FILE",
            ) from None
    session.close()
    session = greet(settings)  # a failed handshake ends the connection
    session.starttls(context=tls_context("", verify=False))
    return session, "STARTTLS, certificate not verified"


def tls_context(ca_file: str, *, verify: bool = True) -> ssl.SSLContext:
    import ssl

    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise Error(f"SMTP_CA_FILE {ca_file}: {error.strerror}", "it must hold CA certificates in PEM form") from None
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def greet(settings: Settings) -> smtplib.SMTP:
    """Connect and say EHLO, with a session that knows whether a message was handed over."""
    import smtplib
    import socket

    class Session(smtplib.SMTP):
        handed_over = False

        def getreply(self) -> tuple[int, bytes]:
            code, text = super().getreply()
            self.handed_over = code == 354  # the message follows, and no answer to it has come yet
            return code, text

    name = socket.gethostname()
    if "." not in name or not name.isascii():
        name = "[127.0.0.1]"  # as smtplib says, but without asking DNS for the full name
    session = Session(settings.smtp_host, settings.smtp_port, local_hostname=name, timeout=TIMEOUT)
    session.ehlo_or_helo_if_needed()
    return session


@contextmanager
def smtp_errors(settings: Settings, session: smtplib.SMTP | None = None) -> Iterator[None]:
    """Tell what smtplib raises as an Error: answers of the server unchanged, 4xx and lost connections as temporary."""
    import smtplib

    where = f"{settings.smtp_host} port {settings.smtp_port}"
    try:
        yield
    except smtplib.SMTPResponseException as error:
        raise answer_error(str(error), settings, temporary=400 <= error.smtp_code < 500) from None
    except smtplib.SMTPNotSupportedError as error:
        raise Error(f"{where}: {error}", "is this the right server and port?") from None
    except OSError as error:  # SMTPServerDisconnected too
        reason = error.strerror or str(error)
        if getattr(session, "handed_over", False):
            raise TemporaryError(
                f"{where}: {reason}; the message may have been sent", "look before resending"
            ) from None
        raise TemporaryError(
            f"{where}: {reason}", "is the server running, and SMTP_HOST and SMTP_PORT right?"
        ) from None
    except ValueError:  # of the idna codec, or from an answer to AUTH that is no base64
        raise Error(f"{where}: no dialogue with this server is possible", "is SMTP_HOST right?") from None


def answer_error(answer: str, settings: Settings, *, temporary: bool) -> Error:
    """A server's answer, which users know as smtplib prints it."""
    return (TemporaryError if temporary else Error)(without_secrets(answer, settings), prefix="")


def without_secrets(answer: str, settings: Settings) -> str:
    """Hide what a server might repeat of the login."""
    from base64 import b64encode

    login = f"\0{settings.smtp_user}\0{settings.smtp_password}"
    secrets = [settings.smtp_password, settings.api_key]
    for secret in [b64encode(text.encode()).decode() for text in [login, *secrets]] + secrets:
        answer = answer.replace(secret, STARS) if secret else answer
    return answer


class Api:
    """Sends messages through the SparkPost transmissions API.

    Source: https://developers.sparkpost.com/api/transmissions/
    """

    def __init__(self, settings: Settings, return_path: str | None) -> None:
        from urllib import request

        self.settings = settings
        self.return_path = return_path
        self.opener = request.OpenerDirector()  # one that follows no redirection: the API key must not go along
        for handler in (
            request.ProxyHandler(),
            request.HTTPHandler(),
            request.HTTPSHandler(),
            request.HTTPErrorProcessor(),
            request.HTTPDefaultErrorHandler(),
        ):
            self.opener.add_handler(handler)
        self.banner: tuple[str, ...] = ("Opened API connection", f"Host: {settings.api_host}", f'API key: "{STARS}"')

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt:
        """Raises Error when no recipient was accepted."""
        import json

        try:
            content = message.decode()
        except UnicodeDecodeError:
            raise Error(
                "the API takes eight-bit text in UTF-8 only", "sign or encrypt it, or use --send_smtp"
            ) from None
        recipients = [{"address": {"email": wire_address(recipient)}} for recipient in envelope.recipients]
        transmission: dict[str, object] = {
            "options": {
                "open_tracking": False,
                "click_tracking": False,
                "transactional": True,
                "perform_substitutions": False,
            },
            "recipients": recipients,
            "content": {"email_rfc822": content},
        }
        if self.return_path is not None:
            transmission["return_path"] = self.return_path
        status, reply = self.post(json.dumps(transmission).encode())
        return self.read_reply(status, reply, len(recipients))

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and reply of the API. Raises Error."""
        from http.client import HTTPException
        from ssl import SSLCertVerificationError
        from urllib.error import HTTPError, URLError
        from urllib.request import Request

        host = self.settings.api_host
        headers = {"Authorization": self.settings.api_key, "Content-Type": "application/json"}
        request = Request(f"{host}/api/v1/transmissions", body, headers | {"User-Agent": f"sparkpostSMIME/{VERSION}"})
        try:
            try:
                response = self.opener.open(request, timeout=TIMEOUT)
            except HTTPError as error:
                response = error
            with response:
                return response.status, response.read(LONGEST_REPLY + 1)
        except URLError as error:
            if isinstance(error.reason, SSLCertVerificationError):
                raise Error(f"{host}: its certificate cannot be verified: {error.reason.verify_message}") from None
            reason = getattr(error.reason, "strerror", None) or error.reason
            raise TemporaryError(f"{host}: {reason}", "is SPARKPOST_HOST right, and the network up?") from None
        except (HTTPException, OSError) as error:
            reason = str(error) or type(error).__name__
            raise TemporaryError(f"{host}: {reason}; the message may have been sent", "look before resending") from None

    def read_reply(self, status: int, reply: bytes, recipients: int) -> Receipt:
        """What the API says of a message for so many recipients. Raises Error."""
        answer = json_object(reply)
        results = answer.get("results")
        results = results if isinstance(results, dict) else {}
        lines = api_errors(answer.get("errors")) + api_errors(results.get("rcpt_to_errors"))
        answers = tuple(without_secrets(line, self.settings) for line in lines)
        accepted = results.get("total_accepted_recipients")
        if status == 200 and isinstance(accepted, int):
            return Receipt(min(accepted, recipients), answers)
        reason = "; ".join(answers) or "the reply is cut short, too long, or not from this API"
        where = f"{self.settings.api_host}: HTTP status {status}: {reason}"
        if status == 504:
            raise TemporaryError(f"{where}; the message may have been sent", "look before resending")
        if status in (420, 429) or status >= 500:
            raise TemporaryError(where, "try again later")
        raise Error(where, "are SPARKPOST_API_KEY and SPARKPOST_HOST right?" if status in (401, 403, 404) else "")

    def close(self) -> None:
        pass


def json_object(reply: bytes) -> dict[str, object]:
    """A reply's JSON object, empty where there is none to read."""
    import json

    if len(reply) > LONGEST_REPLY:
        return {}
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def api_errors(errors: object) -> list[str]:
    """Each error as `code, message, description`, as far as it has them."""
    if not isinstance(errors, list):
        return []
    keys = ("code", "message", "description")
    return [", ".join(str(error[key]) for key in keys if error.get(key)) for error in errors if isinstance(error, dict)]


# ----------------------------------------------------------------------------------------------------- program


def run(options: Options, settings: Settings) -> int:
    """Take one message all the way. Returns the exit code; raises Error while nothing has left."""
    raw = read_message(options.file)
    fields, _, body = split_entity(raw)
    envelope = read_envelope(fields, options.return_path)
    copies = plan_copies(envelope, options)
    from_address = author(fields, "from", "sender")
    signer, certificates = load_keys(
        options.keys,
        from_address if options.sign else None,
        [recipient for copy in copies for recipient in copy.recipients] if options.encrypt else [],
        settings.key_password,
    )
    header = outer_fields(fields, options, domain=from_address.rpartition("@")[2])
    if options.sign or options.encrypt:
        entity = make_entity(fields, body, clear=options.sign and not options.opaque)
    else:
        entity = CRLF + to_crlf(body)
    if signer:
        warn_of_date(header)
        entity = sign(entity, signer, opaque=options.opaque)
    head = b"".join(field + CRLF for field in header)
    messages = []
    for copy in copies:
        sealed = encrypt(entity, [certificates[r] for r in copy.recipients]) if options.encrypt else entity
        messages.append((head + sealed, copy))
    line_end = CRLF if raw[: raw.find(b"\n") + 1].endswith(CRLF) else b"\n"
    names = ("From", "To", "Cc", "Bcc")
    people = [f"{name}: {text}" for name in names for text in field_texts(fields, name.lower())]
    return send(messages, options, settings, line_end, [f"Sending: {options.file}", *people])


def plan_copies(envelope: Envelope, options: Options) -> list[Envelope]:
    """One message for all; but encrypted, one more for each Bcc recipient, whom the others' copy would give away."""
    if not options.encrypt:
        return [Envelope(envelope.sender, envelope.recipients + envelope.hidden)]
    copies = [Envelope(envelope.sender, envelope.recipients)] if envelope.recipients else []
    if options.send_smtp or options.send_api:
        return copies + [Envelope(envelope.sender, (recipient,)) for recipient in envelope.hidden]
    if not copies:
        raise Error("the message has Bcc recipients only, and their copies are not printed", "use --send_smtp")
    if envelope.hidden:
        warn(f"the printed copy leaves out the Bcc recipients {', '.join(envelope.hidden)}")
    return copies


def warn_of_date(header: Iterable[bytes]) -> None:
    """Thunderbird calls a signature invalid when it was made more than an hour from the message's Date."""
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime

    date = field_texts(header, "date")[0]
    try:
        distance = abs(datetime.now(timezone.utc) - parsedate_to_datetime(date).astimezone(timezone.utc))
    except (ValueError, TypeError, IndexError, OverflowError):
        warn(f"the Date {date[:80]!r} cannot be read - --date_now replaces it")
        return
    if distance.total_seconds() > 3600:
        warn(f"the Date {date} is over one hour from now: Thunderbird will call the signature invalid - add --date_now")


def send(
    messages: Sequence[tuple[bytes, Envelope]],
    options: Options,
    settings: Settings,
    line_end: bytes,
    report: Iterable[str],
) -> int:
    """Deliver all copies of a message and report. Returns the exit code; raises Error where none could be tried."""
    from time import perf_counter

    started = perf_counter()
    transport = open_transport(options, settings, line_end)
    if transport.banner:
        for line in (*transport.banner, *report):
            say(line)
    receipts = [deliver(transport, *message) for message in messages]
    seconds = perf_counter() - started
    transport.close()
    for answer in dict.fromkeys(answer for receipt in receipts for answer in receipt.answers):
        complain(answer)
    accepted = sum(receipt.accepted for receipt in receipts)
    wanted = sum(len(envelope.recipients) for _, envelope in messages)
    if accepted and transport.banner:
        some = "" if accepted == wanted else f" for {accepted} of {wanted} recipients"
        say(f"OK{some} - in {seconds:.3f} seconds")
    if accepted == wanted:
        return EXIT_OK
    return EXIT_TEMPORARY if not accepted and all(receipt.temporary for receipt in receipts) else EXIT_FAILED


def open_transport(options: Options, settings: Settings, line_end: bytes) -> Transport:
    if options.send_smtp:
        return Smtp(settings)
    return Api(settings, options.return_path) if options.send_api else Stdout(line_end)


def deliver(transport: Transport, message: bytes, envelope: Envelope) -> Receipt:
    """Deliver one copy; a failure is a receipt too, for the other copies must still go."""
    try:
        return transport.deliver(message, envelope)
    except Error as error:
        return Receipt(0, (str(error),), isinstance(error, TemporaryError))


def say(line: str, descriptor: int = 1) -> None:
    """Write a line to standard output at once, whatever characters it holds; that nobody reads it is no failure."""
    with suppress(OSError), open(descriptor, "w", errors="backslashreplace", closefd=False) as output:
        output.write("".join(c if c.isprintable() or c == "\t" else "?" for c in line) + "\n")


def complain(line: str) -> None:
    """Write a line to standard error."""
    say(line, 2)


def warn(text: str) -> None:
    complain(f"{PROGRAM}: warning: {text}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_args(argv)
    try:
        return run(options, read_settings(read_environment(os.environ, options.env_file), options))
    except Error as error:
        complain(str(error))
        return error.exit_code
    except ImportError as error:
        complain(f"{PROGRAM}: the package {error.name} is missing or too old - pip install -r requirements.txt")
        return EXIT_FAILED
    except KeyboardInterrupt:
        complain(f"{PROGRAM}: interrupted")
        return EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
