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

Followed here: RFC 8551 and 8550 (S/MIME 4.0), 5652 (CMS), 5322, 2045 to 2047 and 2231 (messages), 5321, 6531 and
3207 (SMTP, international addresses, STARTTLS).

Exit codes: 0, every recipient was accepted; 1, something was refused or is wrong; 2, the command line is wrong;
75, a temporary failure: the same command may succeed later.

Modules are imported where they are used: --help answers at once, and a run loads nothing but its own transport.
"""

from __future__ import annotations

import argparse
import os
import re
from contextlib import contextmanager, suppress
from functools import partial

TYPE_CHECKING = False  # typing, like dataclasses, takes longer to load than --help takes to answer
if TYPE_CHECKING:
    import smtplib
    import ssl
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

# ---------------------------------------------------------------------------------------------------- constants

PROGRAM = "sparkpostSMIME.py"
VERSION = "1.0.0"
EXIT_OK, EXIT_FAILED, EXIT_TEMPORARY = 0, 1, 75  # 75 is EX_TEMPFAIL: a mail server's pipe tries again later
TIMEOUT = 60  # seconds, for each step of a dialogue on the network
LONGEST_LINE = 998  # bytes before CRLF, RFC 5322 section 2.1.1
LARGEST_CONTENT = 20_000_000  # bytes, that the API takes
LARGEST_REPLY = 1_000_000  # bytes, of the API, that are read
DEEPEST_NESTING = 100  # of parts in parts; Postfix stops there too
STARS = "*" * 40
SPARKPOST_HOSTS = (".sparkpostmail.com", ".sparkpostelite.com", ".sparkpost.com")
CRLF = b"\r\n"

ADDRESS_FIELDS = {"from", "sender", "reply-to", "to", "cc", "bcc"}
ADDRESS_FIELDS |= {f"resent-{name}" for name in ADDRESS_FIELDS} | {"disposition-notification-to", "errors-to"}
DROPPED_FIELDS = {"bcc", "resent-bcc", "return-path", "content-length"}
FIELD_TYPES = {"message/delivery-status", "message/disposition-notification"}  # hold fields: RFC 3464, RFC 8098

# ------------------------------------------------------------------------------------------------------- errors


class Error(Exception):
    """What a user or a server caused, in one line: what is wrong, and a hint that names the cure.

    `prefix` is empty only for the lines that users know word for word.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "", *, prefix: str = f"{PROGRAM}: ") -> None:
        self.text = f"{message} - {hint}" if hint else message
        super().__init__(prefix + self.text)


class TemporaryError(Error):
    """A failure that may be gone when the same command runs again."""

    exit_code = EXIT_TEMPORARY


class Unreachable(TemporaryError):
    """The server cannot be reached or is gone; it is useless to try the next message."""


# -------------------------------------------------------------------------------------------------------- types


class Options(argparse.Namespace):
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


class Settings(argparse.Namespace):
    """The environment. Holds secrets, so it has no repr."""

    __repr__ = object.__repr__

    smtp_host: str
    smtp_port: int
    smtp_user: str
    smtp_password: str
    smtp_tls: str
    smtp_ca_file: str
    api_key: str
    api_host: str
    key_password: str


class Envelope:
    """Who a message comes from and who gets it (RFC 5321), spelt as in its header.

    `hidden` are the recipients that only the Bcc field names.
    """

    def __init__(self, sender: str, recipients: tuple[str, ...], hidden: tuple[str, ...] = ()) -> None:
        self.sender, self.recipients, self.hidden = sender, recipients, hidden


class Signer:
    """A private key, the certificate that belongs to it, and the certificates above that one."""

    def __init__(
        self, key: RSAPrivateKey | EllipticCurvePrivateKey, certificate: Certificate, chain: Sequence[Certificate]
    ) -> None:
        self.key, self.certificate, self.chain = key, certificate, chain


class Receipt:
    """What became of one message: how many recipients were accepted, and the answers about those who were not."""

    def __init__(self, accepted: int, answers: list[str]) -> None:
        self.accepted, self.answers = accepted, answers


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
        add_help=False,
    )
    add, flag = parser.add_argument, "store_true"
    add("file", metavar="FILE.eml", help="The message to send; - reads it from standard input.")
    add("--sign", action=flag, help="Sign with the private key in ADDRESS.pem, where ADDRESS is the one in From; "
        "SMIME_KEY_PASSWORD is its passphrase.")  # fmt: skip
    add("--encrypt", action=flag, help="Encrypt for every recipient, with the certificate in the ADDRESS.crt of each.")
    add("--opaque", action=flag, help="With --sign, wrap the text into the signature, where no server can alter it.")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--send_smtp", action=flag, help="Send to the server in SMTP_HOST; SMTP_PORT, SMTP_USER, "
        "SMTP_PASSWORD, SMTP_TLS and SMTP_CA_FILE say how.")  # fmt: skip
    way.add_argument("--send_api", action=flag, help="Send through the SparkPost API, with the key in "
        "SPARKPOST_API_KEY, to the host in SPARKPOST_HOST.")  # fmt: skip
    add("--keys", metavar="DIR", default=".", help="Look for key files in this folder, not in the current one.")
    add("--env_file", metavar="FILE", help="Read variables from this file, not from my_envs.sh in the current folder.")
    add("--return_path", metavar="ADDRESS", help="Have bounces sent to this address; <> asks for none.")
    add("--date_now", action=flag, help="Replace the Date field by the present time.")
    add("--version", action="version", version=f"{PROGRAM} {VERSION}", help="Print the version.")
    add("-h", "--help", action="help", help="Print this help.")
    options = parser.parse_args(argv, Options())
    if options.opaque and not options.sign:
        parser.error("--opaque is a way to sign: add --sign")
    return options


def read_environment(environ: Mapping[str, str], env_file: str | None) -> Mapping[str, str]:
    """The variables of the environment, and below them those of the settings file, which is never executed.

    Raises Error for a file that cannot be read, or that other users could read or write.
    """
    path = "my_envs.sh" if env_file is None else env_file
    if env_file is None and not os.path.lexists(path):
        return environ
    import io
    import logging

    from dotenv import dotenv_values

    logging.basicConfig(format=f"{PROGRAM}: {path.replace('%', '%%')}: %(message)s")  # for what it cannot read
    try:
        content = read_file(path, secret=True, owned=True).decode()
    except UnicodeDecodeError:
        raise Error(f"{path}: this settings file is not UTF-8 text") from None
    values = dotenv_values(stream=io.StringIO(content), interpolate=False)
    return {name: value for name, value in values.items() if value} | dict(environ)


def read_settings(environ: Mapping[str, str], options: Options) -> Settings:
    """Check the variables that this run needs, before anything else is read. Raises Error."""
    settings = Settings(
        smtp_host=environ.get("SMTP_HOST", ""),
        smtp_port=25,
        smtp_user=environ.get("SMTP_USER", ""),
        smtp_password=environ.get("SMTP_PASSWORD", ""),
        smtp_tls=environ.get("SMTP_TLS") or "auto",
        smtp_ca_file=environ.get("SMTP_CA_FILE", ""),
        api_key=environ.get("SPARKPOST_API_KEY", ""),
        api_host="",
        key_password=environ.get("SMIME_KEY_PASSWORD", ""),
    )
    if options.send_smtp:
        require(environ, "SMTP_HOST", "SMTP_USER", "SMTP_PASSWORD")
        settings.smtp_port = port_number(environ.get("SMTP_PORT") or "25", "SMTP_PORT")
        if settings.smtp_tls not in ("auto", "verify", "off"):
            raise Error(f"SMTP_TLS is {settings.smtp_tls!r}", "it must be auto, verify or off")
    if options.send_api:
        require(environ, "SPARKPOST_API_KEY")
        settings.api_host = api_url(environ.get("SPARKPOST_HOST") or "https://api.sparkpost.com")
    return settings


def require(environ: Mapping[str, str], name: str, *others: str) -> None:
    """Raise Error where this variable is not set, or where it or the others hold what the network cannot carry."""
    if not environ.get(name):
        raise Error(f"Environment var {name} not set - stopping", prefix="")
    for each in (name, *others):
        if not re.fullmatch(r"[ -~]*", environ.get(each, "")):
            raise Error(f"{each} holds a line break or a character outside ASCII", "set it anew")


def port_number(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 1 << 16:
        raise Error(f"{name} is {text[:20]!r}", "a port is a number from 1 to 65535")
    return int(text)


def api_url(host: str) -> str:
    """The base of the API's address. Raises Error for one that would send the key in the clear."""
    url = re.fullmatch(
        r"(?:(https?)://)?([\w-]{1,63}(?:\.[\w-]{1,63})*|\[[0-9A-Fa-f:]+\])(?::([0-9]+))?/?", host, re.ASCII
    )
    if not url:
        raise Error("SPARKPOST_HOST is no address of an API", "it must be like https://api.eu.sparkpost.com")
    scheme, name, port = url[1] or "https", url[2], url[3] or ""
    if scheme == "http" and not is_loopback(name.strip("[]")):
        raise Error("SPARKPOST_HOST with http:// would send the API key unencrypted", f"use https://{name}")
    return f"{scheme}://{name}" + (f":{port_number(port, 'the port in SPARKPOST_HOST')}" if port else "")


def is_loopback(host: str) -> bool:
    """Whether this host name or numeric address never leaves the machine."""
    from ipaddress import ip_address

    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_file(path: str, *, secret: bool = False, owned: bool = False) -> bytes:
    """The bytes of a file, or of standard input for `-`.

    Raises Error when it cannot be read, when it is secret but others could read it, or when another user owns it.
    """
    from shlex import quote

    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            status = os.fstat(file.fileno())
            if owned and status.st_uid != os.geteuid():
                raise Error(f"{path}: this file belongs to another user", f"chown {os.geteuid()} {quote(path)}")
            if secret and status.st_mode & 0o077:
                mode = "0700" if owned else "0600"
                raise Error(f"{path}: other users can read or change this file", f"chmod {mode} {quote(path)}")
            return file.read()
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from None


# ------------------------------------------------------------------------------------- message: fields, envelope

FIELD = rb"(?:>?From (?![ \t]*:)[^\n]*\n)*([!-9;-~]+[ \t]*:[^\n]*(?:\n[ \t][^\n]*)*)(?:\n|\Z)"
BLANK_LINE = rb"\r?\n"
QUOTED = r'"(?:[^"\\]|\\.)*"'
ATOM = r'[^\s\x00-\x20\x7f"(),:;<>@\[\\\]]+'
ADDRESS = rf"(?s)(?:{QUOTED}|{ATOM})@(?:{ATOM}|\[[!-Z^-~]+\])"
MAILBOX = rf'(?s)((?:{QUOTED}|<(?:{QUOTED}|[^<>"])*>|\[[^\[\]]*\]|[^"<>\[\],;:])*)([,;:]|\Z)'
BRACKETED = rf'(?s)(?:{QUOTED}|[^"<>])*<(?:@[^:<>]*:)?((?:{QUOTED}|[^<>"])*)>'


def split_entity(entity: bytes) -> tuple[list[bytes], bytes, bytes]:
    """Cut an entity into header fields, the blank line after them, if there is one, and body.

    The fields are folded with CRLF and lack the last one; the body stays as it came. The header ends at the first line
    that is no field (RFC 5322 section 2.1); mbox "From " lines before a field are dropped.
    """
    fields, end = [], 0
    while match := re.compile(FIELD).match(entity, end):
        fields.append(to_crlf(match[1].rstrip(b"\r")))
        end = match.end()
    blank = re.compile(BLANK_LINE).match(entity, end)
    start = blank.end() if blank else end
    return fields, CRLF if blank else b"", entity[start:]


def to_crlf(data: bytes) -> bytes:
    """Make CRLF of every line end, be it CRLF or LF."""
    if data.count(b"\n") == data.count(CRLF):
        return data
    return data.replace(CRLF, b"\n").replace(b"\n", CRLF)


def charset_of(raw: bytes) -> str:
    """UTF-8, or Latin-1, in which all bytes are text."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "iso-8859-1"
    return "utf-8"


def to_text(raw: bytes) -> str:
    return raw.decode(charset_of(raw))


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
        sender = "" if return_path in ("", "<>") else parse_mailbox(return_path, "--return_path")
    shown = unique(addresses(fields, "to", "cc"))
    everyone = unique([*shown, *addresses(fields, "bcc")])
    if not everyone:
        raise Error("the message has no recipient", "name one in a To, Cc or Bcc field")
    return Envelope(sender, shown, everyone[len(shown) :])


def unique(addresses: Iterable[str]) -> tuple[str, ...]:
    """Each mailbox once, as it is spelt first; in domains alone case does not count (RFC 5321 section 2.4)."""
    found: dict[tuple[str, str], str] = {}
    for address in addresses:
        local, _, domain = address.rpartition("@")
        found.setdefault((local, domain.lower()), address)
    return tuple(found.values())


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
            end, text = 0, without_comments(value)
            while end < len(text):
                mailbox = re.compile(MAILBOX).match(text, end)
                if not mailbox or (mailbox[2] == ":" and "@" in re.sub(QUOTED, "", mailbox[1])):
                    raise unreadable(text[end:], name)
                end = mailbox.end()
                if mailbox[2] != ":" and mailbox[1].strip():  # the text before a colon is the name of a group
                    found.append(parse_mailbox(mailbox[1].strip(), name))
    return found


def without_comments(text: str) -> str:
    """The value of a field without its (comments), which nest (RFC 5322 section 3.2.2); as it is where one is open."""
    outside, within = re.compile(rf'{QUOTED}|[()]|[^"()]+|"', re.DOTALL), re.compile(r"\\.|[()]|[^\\()]+|\\", re.DOTALL)
    depth, kept, end = 0, [], 0
    while token := (within if depth else outside).match(text, end):
        end = token.end()
        if token[0] == "(":
            depth += 1
        elif depth and token[0] == ")":
            depth -= 1
            kept.append(" " if not depth else "")
        elif not depth:
            kept.append(token[0])
    return text if depth else "".join(kept)


def parse_mailbox(mailbox: str, name: str) -> str:
    """The address in `Name <address>` or `address`. Raises Error."""
    bracketed = re.fullmatch(BRACKETED, mailbox)
    spaced = (bracketed[1] if bracketed else mailbox).strip()
    address = re.sub(rf"({QUOTED})|\s*([.@])\s*", lambda match: match[1] or match[2], spaced)  # RFC 5322 section 4.4
    if not re.fullmatch(ADDRESS, address) or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", mailbox):
        raise unreadable(mailbox, name)
    return address


def unreadable(text: str, name: str) -> Error:
    return Error(f"the {name} field holds an address that cannot be read: {text[:80]!r}", "write Name <user@domain>")


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
UNSTRUCTURED = words()
ADDRESS_LIST = (
    rb'(?s)(?P<address><[^<>]*>|(?:%b|[^\s"<>(),:;@]+)@[^\s"<>(),;]+(?![^,;<]*<))|' % BYTES_QUOTED
    + rb"(?P<quoted>%b)|%b" % (BYTES_QUOTED, words(rb'"<>(),:;'))
)
PARAMETER = rb'(?s)(;\s*[^\s;="*]+)\s*=\s*(%b|[^\s;"]+)' % BYTES_QUOTED
ENCODED_WORD = rb"=\?[^?\s]+\?[BbQq]\?[^?\s]*\?="
RAW_ENCODED_WORD = rb"=\?([^?\s]+)\?([BbQq])\?([^?\r\n]*[\x80-\xff][^?\r\n]*)\?="
CONTROLS = rb"\0|\r(?!\n)"
LONG_LINE = rb"[^\r\n]{%d}" % (LONGEST_LINE + 1)
CALLED_EIGHT_BIT = rb"content-transfer-encoding[ \t]*:[^\n]*(?:\n[ \t][^\n]*)?(?:8bit|binary)"


def outer_fields(fields: Iterable[bytes], options: Options, domain: str) -> list[bytes]:
    """The fields that stay outside, in order and fit for transport, with those that every message must have."""
    from email.utils import formatdate, make_msgid

    now = b"Date: " + formatdate(localtime=True).encode()
    rewritten = options.sign or options.encrypt
    dropped = DROPPED_FIELDS | ({"dkim-signature"} if rewritten else set())  # it signs the body as it was
    outer: list[bytes] = []
    present = set()
    for field in fields:
        name = field_name(field)
        if name in dropped or (rewritten and name.startswith("content-")):
            continue
        if name in present and (name == "mime-version" or (name == "date" and options.date_now)):
            continue
        present.add(name)
        outer.append(now if name == "date" and options.date_now else fit_field(field))
    if "date" not in present:
        outer.append(now)
    if "message-id" not in present:
        outer.append(b"Message-ID: " + make_msgid(domain=wire_address(domain)).encode())
    if "mime-version" not in present:
        outer.append(b"MIME-Version: 1.0")
    return outer


def fit_field(field: bytes) -> bytes:
    """Make a field ASCII, without NUL or a lone CR, in lines of at most 998 bytes; one that is so stays as it is."""
    if not field.isascii() or re.search(CONTROLS, field):
        name = field_name(field)
        head, colon, value = re.sub(CONTROLS, b" ", field).partition(b":")
        if name in ("content-type", "content-disposition"):
            value = re.sub(PARAMETER, encode_parameter, value)
        field = head + colon + encode_words(value, ADDRESS_LIST if name in ADDRESS_FIELDS else UNSTRUCTURED)
    return CRLF.join(fold(line) for line in field.split(CRLF))


def fold(line: bytes) -> bytes:
    """Fold a line of more than 998 bytes before the white space in it (RFC 5322 section 2.2.3)."""
    if len(line) <= LONGEST_LINE:
        return line
    return re.sub(rb"(.{0,%d}[^ \t])(?=[ \t]+[^ \t])" % (LONGEST_LINE - 1), rb"\1\r\n", line)


def encode_words(value: bytes, token: bytes) -> bytes:
    """Turn raw text in a field's value into encoded words (RFC 2047), except in addresses (RFC 6532)."""
    value = re.sub(RAW_ENCODED_WORD, mend_encoded_word, to_text(value).encode())
    pieces, end, before = [], 0, ""
    for match in re.finditer(token, value):
        gap, word, kind = value[end : match.start()], match[0], ""
        if word.isascii():
            kind = "old" if re.fullmatch(ENCODED_WORD, word) else ""
        elif match.lastgroup == "address":
            word = re.sub(rb"[^<>]+", lambda inner: wire_address(inner[0].decode()).encode(), word)
        else:
            kind = "new"
            word = encoded_words((unquoted(word) if match.lastgroup == "quoted" else word).decode())
            # nothing but white space or the parentheses of a comment may touch it, RFC 2047 section 5
            left, right = value[: match.start()][-1:], value[match.end() :][:1]
            word = (b"" if left in b" \t\n(" else b" ") + word + (b"" if right in b" \t\r)" else b" ")
        if gap.isspace() and {before, kind} in ({"new"}, {"old", "new"}):
            gap += encoded_words(" ") + b" "  # blanks between encoded words are not shown, RFC 2047 section 6.2
        pieces += [gap, word]
        end, before = match.end(), kind
    return b"".join(pieces) + value[end:]


def unquoted(word: bytes) -> bytes:
    """What a quoted string holds (RFC 5322 section 3.2.4); any other word as it is."""
    return re.sub(rb"\\(.)", rb"\1", word[1:-1], flags=re.DOTALL) if word.startswith(b'"') else word


def encoded_words(text: str) -> bytes:
    """Encoded words of at most 75 bytes, cut between characters (RFC 2047 sections 2 and 5)."""
    from binascii import b2a_base64

    data = text.replace("\r\n", "").encode()
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
    return name + b"*=" + quote_from_bytes(unquoted(value), safe="").encode()


# ----------------------------------------------------------------------------- message: entity fit for transport


def make_entity(fields: Iterable[bytes], body: bytes, *, clear: bool) -> bytes:
    """The MIME entity of a message, its Content- fields and its body, fit for transport.

    `clear` asks for what a clear signature needs on top. Raises Error where that cannot be had.
    """
    content = [f for f in fields if field_name(f).startswith("content-") and field_name(f) not in DROPPED_FIELDS]
    if not field_texts(content, "content-type"):
        charset = "" if body.isascii() else f"; charset={charset_of(body)}"
        content.insert(0, f"Content-Type: text/plain{charset}".encode())
    entity = fit_entity(b"".join(field + CRLF for field in content) + CRLF + body, clear=clear)
    if clear and not is_fit(entity, clear=True):
        raise Error("a part has a header that is unfit for a clear signature, and no encoding can help", "use --opaque")
    return entity


def is_fit(entity: bytes, *, clear: bool) -> bool:
    """Whether mail servers carry these bytes, with line ends of CRLF, unaltered (RFC 8551 section 3.1).

    Under a clear signature, "From " at the start of a line and blanks at its end are at risk too.
    """
    return (
        entity.isascii()
        and b"\0" not in entity
        and entity.count(b"\r") == entity.count(CRLF)
        and not re.match(LONG_LINE, entity)
        and not re.search(rb"\n" + LONG_LINE, entity)
        and not (clear and (entity.startswith(b"From ") or b"\nFrom " in entity))
        and not (clear and (entity.endswith((b" ", b"\t")) or b" \r" in entity or b"\t\r" in entity))
    )


def fit_entity(raw: bytes, *, clear: bool, default: str = "text/plain", depth: int = 0) -> bytes:
    """The entity with CRLF line ends; what is unfit for transport in it is re-encoded, part by part.

    A part already signed is left alone. `default` is the type of an entity that names none. Raises Error.
    """
    entity = to_crlf(raw)
    if is_fit(entity, clear=clear) and not re.search(CALLED_EIGHT_BIT, entity.lower()):
        return entity
    if depth == DEEPEST_NESTING:
        raise Error(f"the message has parts in parts, more than {DEEPEST_NESTING} deep")
    fields, blank, body = split_entity(raw)
    blank = CRLF if body else blank
    kind, boundary = media_type(fields, default)
    encoding = transfer_encoding(fields)
    inner = "message/rfc822" if kind == "multipart/digest" else "text/plain"  # RFC 2046 section 5.1.5
    fit_inner = partial(fit_entity, clear=clear, default=inner, depth=depth + 1)
    parts = fit_parts(body, boundary, fit_inner, clear=clear) if boundary and kind.startswith("multipart/") else None
    if parts is not None:
        body = parts
    elif kind in ("message/rfc822", "message/global") and encoding not in ("base64", "quoted-printable"):
        body = fit_inner(body)
    else:
        encoding, body = fit_leaf(body, kind, encoding, clear=clear)
    if encoding in ("8bit", "binary"):  # Postfix re-encodes a part called so, even if it is ASCII
        encoding = "7bit"
    header = b"".join(fit_field(field) + CRLF for field in with_transfer_encoding(fields, encoding))
    if clear:
        header = re.sub(rb"[ \t\r\n]+(?=\r\n)", b"", header)
    fit = header + blank + body
    if kind == "multipart/signed" and fit != entity:
        if clear:
            raise Error("the message holds a signed part, unfit for a clear signature around it", "use --opaque")
        return entity
    return fit


def media_type(fields: Iterable[bytes], default: str) -> tuple[str, str | None]:
    """Type and boundary as the standard library reads them."""
    from email.message import Message

    entity = Message()
    entity.set_default_type(default)
    for value in field_texts(fields, "content-type")[:1]:
        entity["Content-Type"] = value
    try:
        return entity.get_content_type(), entity.get_boundary()
    except (ValueError, LookupError, TypeError):  # a parameter in RFC 2231 form that is nonsense
        return entity.get_content_type(), None


def transfer_encoding(fields: Iterable[bytes]) -> str:
    """The Content-Transfer-Encoding, empty where the entity names none."""
    values = field_texts(fields, "content-transfer-encoding")
    return without_comments(values[0]).split(";")[0].strip().lower() if values else ""


def with_transfer_encoding(fields: Sequence[bytes], encoding: str) -> list[bytes]:
    """The fields, with this one Content-Transfer-Encoding."""
    others = [field for field in fields if field_name(field) != "content-transfer-encoding"]
    if encoding == transfer_encoding(fields) and len(fields) - len(others) < 2:
        return list(fields)
    return [*others, b"Content-Transfer-Encoding: " + encoding.encode()]


def fit_parts(body: bytes, boundary: str, fit_part: Callable[[bytes], bytes], *, clear: bool) -> bytes | None:
    """The body of a multipart, each part made fit (RFC 2046 section 5.1.1); None where it holds no boundary line.

    An unfit preamble or epilogue, which no reader shows, is left out; so are blanks after a boundary.
    """
    delimiter = rb"(?:\A|\r?\n)--%b(--)?[ \t]*(?=\r?\n|\Z)" % re.escape(boundary.encode())
    pieces: list[bytes] = []
    end, inside = 0, False
    for match in re.finditer(delimiter, body):
        pieces += [fit_piece(body[end : match.start()], inside, fit_part, clear=clear), to_crlf(match[0]).rstrip()]
        end, inside = match.end(), not match[1]
        if not inside:
            break
    return b"".join([*pieces, fit_piece(body[end:], inside, fit_part, clear=clear)]) if pieces else None


def fit_piece(piece: bytes, inside: bool, fit_part: Callable[[bytes], bytes], *, clear: bool) -> bytes:
    """What stands between two boundaries, a part after a line end; or before the first, or after the last."""
    line_end = re.match(BLANK_LINE, piece)
    if inside:
        return CRLF + fit_part(piece[line_end.end() :]) if line_end else b""
    text = to_crlf(piece)
    return text if is_fit(text, clear=clear) else b""


def fit_leaf(body: bytes, kind: str, encoding: str, *, clear: bool) -> tuple[str, bytes]:
    """Encoding and body of a part that holds no parts, re-encoded where it is unfit; it decodes to the same bytes."""
    is_text = kind.startswith(("text/", "multipart/")) or kind in FIELD_TYPES
    if kind.startswith("message/") and not is_text:  # not to be encoded, RFC 2046 section 5.2
        return encoding, to_crlf(body)
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
    return CRLF.join(
        line if len(line) <= 76 else re.sub(rb"(?=.{77})(.{1,75}(?<!=)(?<!=[0-9A-F]))", rb"\1=\r\n", line)
        for line in escaped.split(CRLF)
    )


def base64_lines(data: bytes) -> bytes:
    """Base64 in lines of 76 characters (RFC 2045 section 6.8), made in pieces to spare memory."""
    from binascii import b2a_base64

    piece = 57 * 1024  # 57 bytes make a line
    pieces = (data[start : start + piece] for start in range(0, len(data), piece))
    return CRLF.join(wrap(b2a_base64(piece, newline=False)) for piece in pieces)


def wrap(text: bytes) -> bytes:
    return CRLF.join(text[start : start + 76] for start in range(0, len(text), 76))


# -------------------------------------------------------------------------------------------------------- keys


def key_file(folder: str, address: str, suffix: str) -> str:
    """The path of an address's key file: spelt as the address is, else in lower case. Raises Error."""
    if "/" in address or "\0" in address or address.startswith("."):
        raise Error(f"{address}: an address with / or a leading dot names no key file")
    for name in (address, address.lower()):
        path = os.path.join(folder, name + suffix)
        if os.path.exists(path):
            return path
    raise Error(f"{os.path.join(folder, address + suffix)} not found", "put it there, or name its folder with --keys")


def load_signer(folder: str, address: str, password: str) -> Signer:
    """The key of ADDRESS.pem, with its certificate and chain from there or from ADDRESS.crt. Raises Error."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    path = key_file(folder, address, ".pem")
    pem = read_file(path, secret=True)
    key = load_key(path, pem, password)
    if not isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)):
        raise Error(f"{path}: this kind of key cannot sign S/MIME", "use an RSA or elliptic curve (NIST) key")
    certificates = load_certificates(path, pem) if b"-----BEGIN CERTIFICATE" in pem else []
    public = key.public_key()
    if not any(certificate.public_key() == public for certificate in certificates):
        path = key_file(folder, address, ".crt")
        certificates += load_certificates(path, read_file(path))
    own = [certificate for certificate in certificates if certificate.public_key() == public]
    if not own:
        raise Error(f"{path}: no certificate here belongs to the key of {address}", "get the one made for this key")
    latest = max(own, key=lambda certificate: certificate.not_valid_before_utc)  # renewed for the same key
    check_certificate(path, latest)
    return Signer(key, latest, [certificate for certificate in dict.fromkeys(certificates) if certificate not in own])


def load_key(path: str, pem: bytes, password: str) -> object:
    """The private key in PEM text. Raises Error, which never holds what the file holds."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    encrypted = b"-----BEGIN ENCRYPTED" in pem or b"Proc-Type: 4,ENCRYPTED" in pem
    if encrypted and not password:
        raise Error(f"{path}: this key has a passphrase", "set SMIME_KEY_PASSWORD")
    try:
        return load_pem_private_key(pem, password.encode() if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        cure = "is SMIME_KEY_PASSWORD right?" if encrypted else "it must hold a private key in PEM form"
        raise Error(f"{path}: no private key can be read from this file", cure) from None


def load_certificates(path: str, pem: bytes) -> list[Certificate]:
    """All certificates in PEM text. Raises Error."""
    import warnings

    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.x509 import InvalidVersion, load_pem_x509_certificates

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd serial numbers, about which a user can do nothing
            certificates = load_pem_x509_certificates(pem)
            for certificate in certificates:  # parsed when first asked for
                certificate.public_key(), certificate.subject, certificate.issuer, certificate.extensions
    except (ValueError, InvalidVersion, UnsupportedAlgorithm):
        raise Error(f"{path}: no certificate can be read from this file", "it must hold some in PEM form") from None
    return certificates


def load_recipient(folder: str, address: str) -> Certificate:
    """The one certificate of ADDRESS.crt that is not there as an issuer. Raises Error, also where that is unclear."""
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    path = key_file(folder, address, ".crt")
    certificates = load_certificates(path, read_file(path))
    issuers = [certificate.issuer for certificate in certificates if certificate.issuer != certificate.subject]
    own = [certificate for certificate in dict.fromkeys(certificates) if certificate.subject not in issuers]
    if len(own) > 1:
        own = [certificate for certificate in own if not is_authority(certificate)]
    if len(own) != 1:
        raise Error(f"{path}: which certificate is that of {address} is unclear", "leave it and its chain in the file")
    if not isinstance(own[0].public_key(), RSAPublicKey):
        raise Error(f"{path}: the key in this certificate is not RSA", f"ask {address} for an RSA certificate")
    check_certificate(path, own[0])
    return own[0]


def is_authority(certificate: Certificate) -> bool:
    from cryptography.x509 import BasicConstraints

    return any(isinstance(each.value, BasicConstraints) and each.value.ca for each in certificate.extensions)


def check_certificate(path: str, certificate: Certificate) -> None:
    """Raise Error for a certificate outside its period of validity, or one whose key no form made here can use."""
    from datetime import datetime, timezone

    from cryptography.x509.oid import PublicKeyAlgorithmOID

    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= datetime.now(timezone.utc) <= end:
        raise Error(f"{path}: this certificate is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}", "get a current one")
    if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        raise Error(f"{path}: the key in this certificate is for RSASSA-PSS only", "get one with a plain RSA key")


def load_keys(
    folder: str, signer: str, recipients: Iterable[str], password: str
) -> tuple[Signer | None, dict[str, Certificate]]:
    """The signer, where there is one, and every recipient's certificate. Raises one Error that names all at fault."""
    problems, identity, certificates = [], None, {}
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
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7Options, PKCS7SignatureBuilder

    builder = PKCS7SignatureBuilder().set_data(entity).add_signer(signer.certificate, signer.key, SHA256())
    for certificate in signer.chain:  # last, for the calls before it drop what was added
        builder = builder.add_certificate(certificate)
    if opaque:
        return cms_entity("signed-data", builder.sign(Encoding.DER, [PKCS7Options.Binary]))
    signature = builder.sign(Encoding.DER, [PKCS7Options.Binary, PKCS7Options.DetachedSignature])
    while (boundary := b"----=_" + os.urandom(16).hex().encode()) in entity:
        pass
    parts = (
        b'Content-Type: multipart/signed; protocol="application/pkcs7-signature";\r\n'
        b'\tmicalg=sha-256; boundary="%b"\r\n\r\nThis message is signed with S/MIME.\r\n--%b\r\n'
        % (boundary, boundary),
        entity,
        b"\r\n--%b\r\nContent-Type: application/pkcs7-signature; name=smime.p7s\r\n"
        b"Content-Transfer-Encoding: base64\r\n"
        b"Content-Disposition: attachment; filename=smime.p7s\r\n\r\n" % boundary,
        base64_lines(signature),
        b"\r\n--%b--\r\n" % boundary,
    )
    return b"".join(parts)


def encrypt(entity: bytes, certificates: Iterable[Certificate]) -> bytes:
    """An enveloped-data entity that any of these certificates' keys opens (RFC 8551 section 3.3). Raises Error."""
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7EnvelopeBuilder, PKCS7Options

    builder = PKCS7EnvelopeBuilder().set_data(entity).set_content_encryption_algorithm(AES256)
    for certificate in dict.fromkeys(certificates):
        builder = builder.add_recipient(certificate)
    try:
        return cms_entity("enveloped-data", builder.encrypt(Encoding.DER, [PKCS7Options.Binary]))
    except ValueError:
        raise Error("a recipient's certificate holds a key that cannot encrypt", "ask for a new one") from None


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

    def __init__(self, line_end: bytes) -> None:
        self.line_end = line_end
        self.banner: list[str] = []

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt:
        try:
            with open(1, "wb", closefd=False) as stdout:
                stdout.write(message if self.line_end == CRLF else message.replace(CRLF, self.line_end))
        except OSError as error:
            raise Error(f"standard output: {error.strerror}") from None
        return Receipt(len(envelope.recipients), [])

    def close(self) -> None:
        pass


class Smtp:
    """Sends messages to an SMTP server over one connection; what the server answers is told as smtplib prints it."""

    def __init__(self, settings: Settings) -> None:
        """Connect, and log in where there is a password. Raises Error."""
        self.settings = settings
        with smtp_errors(settings):
            self.session, security = open_session(settings)
            if settings.smtp_user and settings.smtp_password:
                self.session.login(settings.smtp_user, settings.smtp_password)
        self.banner = [
            f"Opened SMTP connection ({security})",
            f"Host: {settings.smtp_host}",
            f"Port: {settings.smtp_port}",
            f'User: "{settings.smtp_user}"',
            f'Password: "{STARS if settings.smtp_password else ""}"',
        ]

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt:
        """Raises Error when no recipient was accepted."""
        import smtplib

        recipients = [wire_address(recipient) for recipient in envelope.recipients]
        sender = wire_address(envelope.sender)
        options = self.mail_options(message, [sender, *recipients])
        if self.settings.smtp_host.lower().endswith(SPARKPOST_HOSTS):
            message = untracked(message)
        with smtp_errors(self.settings, self.session):
            try:
                refused = self.session.sendmail(sender, recipients, message, options)
            except smtplib.SMTPRecipientsRefused as error:
                temporary = all(400 <= code < 500 for code, _ in error.recipients.values())
                raise answer_error(str(error), self.settings, temporary=temporary) from None
        return Receipt(
            len(recipients) - len(refused), [without_secrets(str(refused), self.settings)] if refused else []
        )

    def mail_options(self, message: bytes, addresses: Iterable[str]) -> list[str]:
        """What MAIL FROM must say of the message (RFC 6152, RFC 6531). Raises Error where the server cannot do it."""
        header = message[: message.index(CRLF + CRLF)]
        if header.isascii() and all(address.isascii() for address in addresses):
            return ["BODY=8BITMIME"] if not message.isascii() and self.session.has_extn("8bitmime") else []
        if not self.session.has_extn("smtputf8"):
            where = f"{self.settings.smtp_host} does not offer SMTPUTF8, which addresses outside ASCII need"
            raise Error(where, "use an address in ASCII, or another server")
        return ["SMTPUTF8", "BODY=8BITMIME"]

    def close(self) -> None:
        with suppress(OSError):  # as smtplib's errors are; by now the messages are accepted or refused
            self.session.quit()


def untracked(message: bytes) -> bytes:
    """Ask SparkPost not to rewrite links, which would break the signature; a header of the user's own stays."""
    if any(field_name(field) == "x-msys-api" for field in split_entity(message)[0]):
        return message
    return b'X-MSYS-API: {"options": {"open_tracking": false, "click_tracking": false}}\r\n' + message


def open_session(settings: Settings) -> tuple[smtplib.SMTP, str]:
    """A session with the server, and how it is secured. Raises Error, and what smtplib and ssl raise.

    A password crosses no network without verified TLS (RFC 8314 section 3).
    """
    from ssl import SSLCertVerificationError

    session = greet(settings)
    if settings.smtp_tls == "off" or not session.has_extn("starttls"):
        if settings.smtp_tls == "verify":
            raise Error(
                f"{settings.smtp_host} does not offer STARTTLS", "SMTP_TLS=verify demands it; is the port right?"
            )
        if exposes_password(session, settings):
            cure = "do not set SMTP_TLS=off" if settings.smtp_tls == "off" else "use a port that offers STARTTLS"
            raise Error(f"{settings.smtp_host}: a password is not sent over a plain connection", cure)
        return session, "plain"
    try:
        session.starttls(context=tls_context(settings.smtp_ca_file))
        session.ehlo_or_helo_if_needed()
        return session, "STARTTLS"
    except SSLCertVerificationError as error:
        failure = f"{settings.smtp_host}: its certificate cannot be verified: {error.verify_message}"
    session.close()  # a failed handshake ends the connection
    session = greet(settings)
    if settings.smtp_tls == "verify" or settings.smtp_ca_file or exposes_password(session, settings):
        raise Error(failure, "name the CA that issued it in SMTP_CA_FILE")
    session.starttls(context=tls_context("", verify=False))
    session.ehlo_or_helo_if_needed()
    return session, "STARTTLS, certificate not verified"


def exposes_password(session: smtplib.SMTP, settings: Settings) -> bool:
    """Whether a password would go to another machine."""
    peer = session.sock.getpeername()[0] if session.sock else ""
    return bool(settings.smtp_user and settings.smtp_password) and not is_loopback(peer)


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
            if code == -1 and self.handed_over:
                raise smtplib.SMTPServerDisconnected("the answer is not SMTP")
            self.handed_over = code == 354  # the message follows, and no answer to it has come yet
            return code, text

        def data(self, msg: object) -> tuple[int, bytes]:
            try:
                return super().data(msg)  # type: ignore[arg-type]
            except smtplib.SMTPDataError:  # smtplib leaves this transaction open, and the next would be refused
                with suppress(smtplib.SMTPServerDisconnected):
                    self.rset()
                raise

    name = socket.gethostname()
    if "." not in name or not name.isascii():
        name = "[127.0.0.1]"  # as smtplib says, but without asking DNS for the full name
    session = Session(settings.smtp_host, settings.smtp_port, local_hostname=name, timeout=TIMEOUT)
    session.ehlo_or_helo_if_needed()
    return session


@contextmanager
def smtp_errors(settings: Settings, session: smtplib.SMTP | None = None) -> Iterator[None]:
    """Raise what smtplib raises as an Error: answers of the server unchanged, 4xx and lost connections as temporary."""
    import smtplib

    where = f"{settings.smtp_host} port {settings.smtp_port}"
    cure = "is the server running, are SMTP_HOST and SMTP_PORT right?"
    try:
        yield
    except (OSError, ValueError) as error:
        # smtplib's errors are OSErrors; its base64 decoder and the idna codec raise ValueError
        reason = without_secrets(f"{where}: {getattr(error, 'strerror', None) or error}", settings)
        if getattr(session, "handed_over", False):
            raise Unreachable(f"{reason}; the message may have been sent", "look before sending it again") from None
        if isinstance(error, smtplib.SMTPResponseException):
            raise answer_error(str(error), settings, temporary=400 <= error.smtp_code < 500) from None
        lost = isinstance(error, smtplib.SMTPServerDisconnected) or not isinstance(error, smtplib.SMTPException)
        raise (Unreachable if lost and isinstance(error, OSError) else Error)(reason, cure) from None


def answer_error(answer: str, settings: Settings, *, temporary: bool) -> Error:
    return (TemporaryError if temporary else Error)(without_secrets(answer, settings), prefix="")


def without_secrets(answer: str, settings: Settings) -> str:
    """Hide what a server might repeat of the login."""
    from base64 import b64encode

    login = f"\0{settings.smtp_user}\0{settings.smtp_password}" if settings.smtp_password else ""
    plain = [secret for secret in (login, settings.smtp_password, settings.api_key) if secret]
    secrets = [b64encode(secret.encode()).decode() for secret in plain] + plain
    for secret in secrets + [repr(secret.encode())[2:-1] for secret in secrets]:
        answer = answer.replace(secret, STARS)
    return answer


class Api:
    """Sends messages through the SparkPost transmissions API, https://developers.sparkpost.com/api/transmissions/."""

    def __init__(self, settings: Settings, *, own_return_path: bool) -> None:
        from urllib import request

        self.settings, self.own_return_path = settings, own_return_path
        in_the_clear = settings.api_host.startswith("http:")  # to loopback only, so the key must pass no proxy
        self.opener = request.OpenerDirector()  # it follows no redirection: the key must not go along
        for handler in (
            request.ProxyHandler({} if in_the_clear else None),
            request.HTTPHandler(),
            request.HTTPSHandler(),
            request.HTTPErrorProcessor(),
            request.HTTPDefaultErrorHandler(),
        ):
            self.opener.add_handler(handler)
        self.banner = ["Opened API connection", f"Host: {settings.api_host}", f'API key: "{STARS}"']

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt:
        """Raises Error when the API refuses the message as a whole."""
        import json

        if len(message) > LARGEST_CONTENT:
            raise Error(
                f"the API takes no message over {LARGEST_CONTENT} bytes, this has {len(message)}", "use --send_smtp"
            )
        try:
            content = message.decode()
        except UnicodeDecodeError:
            raise Error(
                "the API takes eight-bit text in UTF-8 only", "sign or encrypt it, or use --send_smtp"
            ) from None
        options = dict.fromkeys(("open_tracking", "click_tracking", "perform_substitutions"), False)
        transmission: dict[str, object] = {
            "options": options | {"transactional": True},
            "recipients": [{"address": {"email": wire_address(recipient)}} for recipient in envelope.recipients],
            "content": {"email_rfc822": content},
        }
        if self.own_return_path:
            transmission["return_path"] = wire_address(envelope.sender)
        return self.read_reply(*self.post(json.dumps(transmission).encode()), len(envelope.recipients))

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and reply of the API, empty where it was cut short. Raises Error."""
        from http.client import HTTPException, InvalidURL
        from ssl import SSLCertVerificationError
        from urllib.error import HTTPError, URLError
        from urllib.request import Request

        host = self.settings.api_host
        headers = {"Authorization": self.settings.api_key, "Content-Type": "application/json"}
        request = Request(f"{host}/api/v1/transmissions", body, headers | {"User-Agent": f"sparkpostSMIME/{VERSION}"})
        try:
            response = self.opener.open(request, timeout=TIMEOUT)
        except HTTPError as error:
            response = error
        except URLError as error:
            if isinstance(error.reason, SSLCertVerificationError):
                reason = f"{host}: its certificate cannot be verified: {error.reason.verify_message}"
                raise Error(reason, "name the CA that issued it in SSL_CERT_FILE") from None
            reason = getattr(error.reason, "strerror", None) or str(error.reason)
            raise Unreachable(f"{host}: {reason}", "is SPARKPOST_HOST right, and the network up?") from None
        except (InvalidURL, ValueError):
            raise Error(f"{host}: no request to this address is possible", "is HTTPS_PROXY right?") from None
        except (HTTPException, OSError) as error:
            reason = without_secrets(f"{host}: {error}; the message may have been sent", self.settings)
            raise Unreachable(reason, "look before sending it again") from None
        with response:
            try:
                return response.status, response.read(LARGEST_REPLY + 1)
            except (HTTPException, OSError):
                return response.status, b""

    def read_reply(self, status: int, reply: bytes, recipients: int) -> Receipt:
        """What the API says of a message for so many recipients. Raises Error."""
        answer = json_object(reply)
        results = answer.get("results")
        results = results if isinstance(results, dict) else {}
        answers = api_errors(answer.get("errors")) + api_errors(results.get("rcpt_to_errors"))
        answers = [without_secrets(line, self.settings) for line in answers]
        accepted = results.get("total_accepted_recipients")
        if status == 200 and type(accepted) is int and 0 <= accepted <= recipients:
            lost = f"{recipients - accepted} of {recipients} recipients were not accepted"
            return Receipt(accepted, answers if answers or accepted == recipients else [lost])
        told = "; ".join(answers) or "the reply is cut short, too long, or not from this API"
        where = f"{self.settings.api_host}: HTTP status {status}: {told}"
        if status in (200, 504):
            where += "; the message may have been sent"
        if status in (420, 429) or status >= 500:
            raise TemporaryError(where, "try again later")
        raise Error(where, "are SPARKPOST_API_KEY and SPARKPOST_HOST right?" if status in (200, 401, 403, 404) else "")

    def close(self) -> None:
        pass


def json_object(reply: bytes) -> dict[str, object]:
    """A reply's JSON object, empty where there is none to read."""
    import json

    try:
        value = json.loads(reply) if len(reply) <= LARGEST_REPLY else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def api_errors(errors: object) -> list[str]:
    """Each error as `code, message, description`, as far as it has them."""
    found = []
    for error in errors if isinstance(errors, list) else [errors]:
        parts = [error.get(key) for key in ("code", "message", "description")] if isinstance(error, dict) else [error]
        found.append(", ".join(str(part) for part in parts if part))
    return [line[:1000] for line in found if line]


# ----------------------------------------------------------------------------------------------------- program


def run(options: Options, settings: Settings) -> int:
    """Take one message all the way. Returns the exit code; raises Error while nothing has left."""
    raw = read_file(options.file)
    fields, blank, body = split_entity(raw)
    if not blank:
        refuse_stray_recipients(body)
    envelope = read_envelope(fields, options.return_path)
    copies = plan_copies(envelope, options)
    served = [recipient for copy in copies for recipient in copy.recipients]
    from_address = author(fields, "from", "sender")
    signer, certificates = load_keys(
        options.keys,
        from_address if options.sign else "",
        served if options.encrypt else [],
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
    names = ("From", "To", "Cc", "Bcc")
    people = [f"{name}: {text}" for name in names for text in field_texts(fields, name.lower())]
    left_out = [recipient for recipient in envelope.hidden if recipient not in served]
    if left_out:
        warn(f"the printed copy leaves out the Bcc recipients {', '.join(left_out)}")
    line_end = CRLF if raw[: raw.find(b"\n") + 1].endswith(CRLF) else b"\n"
    return send(messages, options, settings, line_end, [f"Sending: {options.file}", *people])


def refuse_stray_recipients(body: bytes) -> None:
    """Where a line that is no field has ended the header, recipients named below it would get nothing. Raises Error."""
    rest = re.split(rb"\n\r?\n", body, maxsplit=1)[0]
    if re.search(rb"(?im)^(?:resent-)?(?:to|cc|bcc)[^a-z:\n-]*:", rest):
        line = to_text(rest.partition(b"\n")[0])
        raise Error(f"the header ends at a line that is no field, {line[:60]!r}, above recipients", "mend that line")


def plan_copies(envelope: Envelope, options: Options) -> list[Envelope]:
    """One message for all; but encrypted, one more for each Bcc recipient, whom the others' copy would give away."""
    if not options.encrypt:
        return [Envelope(envelope.sender, envelope.recipients + envelope.hidden)]
    copies = [Envelope(envelope.sender, envelope.recipients)] if envelope.recipients else []
    if options.send_smtp or options.send_api:
        return copies + [Envelope(envelope.sender, (recipient,)) for recipient in envelope.hidden]
    if not copies:
        raise Error("the message has Bcc recipients only, and their copies are not printed", "use --send_smtp")
    return copies


def warn_of_date(header: Iterable[bytes]) -> None:
    """Thunderbird calls a signature invalid that was made more than an hour from the message's Date."""
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime

    text = field_texts(header, "date")[0]
    try:
        date = parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        distance = abs((datetime.now(timezone.utc) - date).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        warn(f"the Date {text[:80]!r} cannot be read - --date_now replaces it")
        return
    if distance > 3600:
        warn(f"the Date {text} is over one hour from now: Thunderbird will call the signature invalid - add --date_now")


def send(
    messages: Sequence[tuple[bytes, Envelope]],
    options: Options,
    settings: Settings,
    line_end: bytes,
    report: Iterable[str],
) -> int:
    """Deliver the copies of a message and report. Returns the exit code; raises Error where no transport opens."""
    from time import perf_counter

    started = perf_counter()
    transport = open_transport(options, settings, line_end)
    for line in [*transport.banner, *report] if transport.banner else []:
        say(line)
    accepted, answers, missed, failures = deliver_all(transport, messages)
    seconds = perf_counter() - started
    for answer in dict.fromkeys(answers):
        complain(answer)
    missed = [recipient for recipient in missed if not any(f"{recipient!r}: (" in answer for answer in answers)]
    if accepted and missed:
        complain(f"{PROGRAM}: not sent to {', '.join(missed)}")
    wanted = sum(len(envelope.recipients) for _, envelope in messages)
    if accepted and transport.banner:
        some = "" if accepted == wanted else f" for {accepted} of {wanted} recipients"
        say(f"OK{some} - in {seconds:.3f} seconds")
    transport.close()
    if accepted == wanted:
        return EXIT_OK
    temporary = failures and not accepted and all(isinstance(failure, TemporaryError) for failure in failures)
    return EXIT_TEMPORARY if temporary else EXIT_FAILED


def deliver_all(
    transport: Stdout | Smtp | Api, messages: Iterable[tuple[bytes, Envelope]]
) -> tuple[int, list[str], list[str], list[Error]]:
    """How many recipients were accepted, what was answered, who got nothing, and the failures.

    One failure does not keep the other copies back, unless the server is out of reach.
    """
    accepted, answers, missed = 0, list[str](), list[str]()
    failures: list[Error] = []
    for message, envelope in messages:
        if failures and isinstance(failures[-1], Unreachable):
            missed += envelope.recipients
            continue
        try:
            receipt = transport.deliver(message, envelope)
        except Error as error:
            failures.append(error)
            answers.append(str(error))
            missed += envelope.recipients
        else:
            accepted += receipt.accepted
            answers += receipt.answers
    return accepted, answers, missed, failures


def open_transport(options: Options, settings: Settings, line_end: bytes) -> Stdout | Smtp | Api:
    if options.send_smtp:
        return Smtp(settings)
    return Api(settings, own_return_path=bool(options.return_path)) if options.send_api else Stdout(line_end)


def say(line: str, descriptor: int = 1) -> None:
    """Write a line to standard output at once, whatever characters it holds; that nobody reads it is no failure."""
    with suppress(OSError), open(descriptor, "w", errors="backslashreplace", closefd=False) as output:
        output.write("".join(c if c.isprintable() or c == "\t" else "?" for c in line) + "\n")


def complain(line: str) -> None:
    """Write a line to standard error."""
    say(line, 2)


def warn(text: str) -> None:
    complain(f"{PROGRAM}: warning: {text}")


def occupy_standard_streams() -> None:
    """Open what is closed of stdin, stdout and stderr, lest a socket get its number and the report go to the server."""
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(descriptor)


def main(argv: Sequence[str] | None = None) -> int:
    occupy_standard_streams()
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
        unclear = "; a message under way may have been sent" if options.send_smtp or options.send_api else ""
        complain(f"{PROGRAM}: interrupted{unclear}")
        return EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
