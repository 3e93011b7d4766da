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
    header fields + entity -> transport.deliver(message, envelope) -> Receipt -> Outcome -> report, exit code

Nothing leaves before every step ahead of it has succeeded, and nothing leaves less protected than was asked.

S/MIME hides and seals the body: the text, its markup and its attachments. It does not hide From, To, Cc, Date or any
other header field, and the Subject only with --protect_headers; nor the size of a message, nor that it was sent.

Followed here: RFC 8551 and 8550 (S/MIME 4.0), 5652, 5083, 5084 and 5753 (CMS, AES-GCM, elliptic curves), 9788 (header
protection), 5322, 2045 to 2047 and 2231 (messages), 5321, 6531, 3207 and 2920 (SMTP, international addresses,
STARTTLS, pipelining).

Exit codes: 0, every recipient was accepted; 1, something was refused or is wrong; 2, the command line is wrong;
75, a temporary failure: the same command may succeed later.

Modules that only one way of sending needs are imported where it begins.
"""

import os
import sys

if sys.version_info < (3, 10):  # noqa: UP036, to say so in one line
    raise SystemExit("sparkpostSMIME.py: this needs Python 3.10 or later")

HELP = """\
usage: sparkpostSMIME.py [options] FILE.eml [FILE.eml ...]

Sign and encrypt an e-mail message with S/MIME, then print it, or inject it by SMTP or the SparkPost API.
Without --sign and --encrypt it stays as it is.

  FILE.eml               The message to send; - reads it from standard input, and a folder stands for its *.eml files.
  --sign                 Sign with the private key in ADDRESS.pem (or .p12, .pfx), where ADDRESS is the one in From;
                         SMIME_KEY_PASSWORD is its passphrase.
  --encrypt              Encrypt for every recipient, with the certificate in the ADDRESS.crt (or .cer, .p12, .pfx)
                         of each.
  --opaque               With --sign, wrap the text into the signature, where no server can alter it.
  --protect_headers      Carry the header under the signature too; with --encrypt, hide the Subject (RFC 9788).
  --archive ADDRESS      Let the owner of ADDRESS.crt open the encrypted message too; it is not sent there.
                         This can be given several times.
  --cipher NAME          Encrypt with aes256-cbc, which every reader knows (the default), or with aes256-gcm.
  --rsa_padding NAME     Use RSA keys with pkcs1v15, which every reader knows (the default), or with pss_oaep.
  --send_smtp            Send to the server in SMTP_HOST; SMTP_PORT, SMTP_USER, SMTP_PASSWORD, SMTP_TLS and
                         SMTP_CA_FILE say how.
  --send_api             Send through the SparkPost API, with the key in SPARKPOST_API_KEY, to the host in
                         SPARKPOST_HOST.
  --keys DIR             Look for key files in this folder, not in the current one.
  --ca_file FILE         Use only certificates that the CA certificates in this file vouch for; SMIME_CA_FILE says
                         the same.
  --skip_checks CHECKS   Only warn where a certificate fails one of these checks, which are named with commas
                         between: validity, address, usage, key_size, chain.
  --env_file FILE        Read variables from this file, not from my_envs.sh in the current folder.
  --return_path ADDRESS  Have bounces sent to this address; <> asks for none.
  --recipient ADDRESS    Send to this address, not to those in the header; this can be given several times.
  --date_now             Replace the Date field by the present time.
  --jobs N               Send over this many connections at once, each with a process of its own.
  --sent DIR             Move each file to this folder once every recipient has its message, and let no other run
                         send it meanwhile: what is left is what the next run sends.
  --report FILE          Append a line of JSON for each message to this file.
  --quiet                Print errors and warnings only, and the last line where something failed.
  --version              Print the version.
  -h, --help             Print this help.

Exit codes: 0 every recipient accepted; 1 something was refused or is wrong; 2 wrong command line;
75 temporary failure, try again later. Variables are read from the environment, then from --env_file.
"""
if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    try:
        print(HELP, end="", flush=True)
    finally:
        os._exit(0)  # at once: nothing more is loaded, and an orderly end would take time as well

import gc

gc.disable()  # while all is imported: none of it is garbage
from signal import SIG_DFL, SIG_IGN, SIGCHLD, SIGINT, SIGKILL, SIGTERM, getsignal, signal

if __name__ == "__main__" and getsignal(SIGINT) != SIG_IGN:
    signal(SIGINT, SIG_DFL)  # so that Ctrl-C leaves no traceback until run() handles it

import io
import re
import smtplib
import socket
import ssl
import unicodedata
import warnings
from argparse import ArgumentParser, HelpFormatter, Namespace
from base64 import b64encode
from binascii import b2a_base64, b2a_qp
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from email.utils import formatdate, make_msgid, parsedate_to_datetime
from errno import EWOULDBLOCK
from functools import cache, lru_cache, partial
from ipaddress import ip_address
from itertools import count
from select import POLLIN, POLLOUT, poll
from stat import S_ISREG
from struct import unpack
from time import monotonic, perf_counter, sleep
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote_from_bytes

MISSING = "sparkpostSMIME.py: the package {} is missing or too old - pip install -r requirements.txt"
try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key, pkcs7
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, PublicKeyAlgorithmOID
except ImportError as missing:
    raise SystemExit(MISSING.format(missing.name)) from None

gc.freeze()  # no collection need look at what stays
gc.enable()

ODD_CERTIFICATES = (x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm)
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
Certificates = list[x509.Certificate]
Sources = Mapping[x509.Certificate, str]  # certificates, each with the file that holds it
Answers = dict[str, tuple[int, bytes]]  # of an SMTP server, to recipients
Fault = tuple[str, str, str]  # the check, what is wrong, and the cure
Extension = TypeVar("Extension")

# ---------------------------------------------------------------------------------------------------- constants

PROGRAM = "sparkpostSMIME.py"
VERSION = "1.0.0"
EXIT_OK, EXIT_FAILED, EXIT_TEMPORARY = 0, 1, 75  # 75 is EX_TEMPFAIL: a mail server's pipe tries again later
TIMEOUT = 60  # seconds, for each step of a dialogue on the network
FINAL_TIMEOUT = 600  # seconds, for the answer to a whole message (RFC 5321 section 4.5.3.2.6), lest it be sent twice
LONGEST_LINE = 998  # bytes before CRLF, RFC 5322 section 2.1.1
LARGEST_CONTENT = 20_000_000  # bytes, that the API takes
MESSAGES_PER_CONNECTION = 100  # of SMTP, as SparkPost advises
CONNECTION_LIFE = 15 * 60  # seconds, of the API
COMMANDS_AT_ONCE = 100  # with PIPELINING; more could fill both sides' buffers, RFC 2920 section 3.1
TOO_MANY_RECIPIENTS = 452
PIECE = 100_000  # bytes that are sent, or read, in one step
NOTHING_SENT: dict[str, object] = dict(
    message_id=None, sender=None, accepted=[], refused={}, error=None, id=None, seconds=0.0, attempts=0
)  # what the report says of a message of which nothing else is known
ENOUGH_FAILURES = 3  # messages in a row that find no way into the server
LARGEST_REPLY = 1_000_000  # bytes, of the API, that are read
DEEPEST_NESTING = 100  # of parts in parts; Postfix stops there too
STARS = "*" * 40
NUMBER = 8  # bytes, of a file's number among those that the processes share
NO_TRACKING = b'X-MSYS-API: {"options": {"open_tracking": false, "click_tracking": false}}\r\n'  # it breaks signatures
SPARKPOST_HOSTS = (".sparkpostmail.com", ".sparkpostelite.com", ".sparkpost.com")
CRLF = b"\r\n"
KEY_SUFFIXES, CERTIFICATE_SUFFIXES = (".pem", ".p12", ".pfx"), (".crt", ".cer")
SMALLEST_RSA_KEY = 2048  # bits, RFC 8551 section 4.3
CURVES = ("secp256r1", "secp384r1", "secp521r1")  # P-256, P-384 and P-521
MAIL_USES = {ExtendedKeyUsageOID.EMAIL_PROTECTION, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}  # RFC 8550 section 4.4.4
SMTP_UTF8_MAILBOX = "1.3.6.1.5.5.7.8.9"  # RFC 9598
CHECKS = ("validity", "address", "usage", "key_size", "chain")  # of certificates, RFC 8550 sections 3 and 4

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
    replies: Mapping[str, str] = {}  # of an SMTP server, to each recipient

    def __init__(self, message: str, hint: str = "", *, prefix: str = f"{PROGRAM}: ") -> None:
        self.text = f"{message} - {hint}" if hint else message
        super().__init__(prefix + self.text)


class TemporaryError(Error):
    """A failure that may be gone when the same command runs again."""

    exit_code = EXIT_TEMPORARY


class Lost(TemporaryError):
    """The connection is gone; a message that was handed over may have been sent."""


class Closed(Lost):
    """The server ended the connection before a message was handed over."""


class Unreachable(Closed):
    """There was no way into the server."""


class Barred(Unreachable):
    """There is no way in with these settings, now or later."""

    exit_code = EXIT_FAILED


class Elsewhere(Exception):
    """Another run has this message file, or has moved it."""


@contextmanager
def system_errors(what: str, hint: str = "") -> Iterator[None]:
    """Raise what the operating system refuses as an Error."""
    try:
        yield
    except OSError as error:
        raise Error(f"{what}: {error.strerror or error}", hint) from None


# -------------------------------------------------------------------------------------------------------- types


class Options(Namespace):
    """The command line."""

    files: list[str]
    sign: bool
    encrypt: bool
    opaque: bool
    protect_headers: bool
    archive: list[str]
    cipher: str
    rsa_padding: str
    send_smtp: bool
    send_api: bool
    keys: str
    ca_file: str | None
    skip_checks: list[str]
    env_file: str | None
    return_path: str | None
    recipient: list[str]
    date_now: bool
    jobs: int
    quiet: bool
    report: str | None
    sent: str | None

    @property
    def protects(self) -> bool:
        return self.sign or self.encrypt

    @property
    def sends(self) -> bool:
        return self.send_smtp or self.send_api


class Settings(NamedTuple):
    """The environment. Holds secrets, so its repr tells nothing."""

    smtp_host: str
    smtp_port: int
    smtp_user: str
    smtp_password: str
    smtp_tls: str
    smtp_ca_file: str
    api_key: str
    api_host: str
    key_password: str
    ca_file: str

    def __repr__(self) -> str:
        return "Settings(...)"


class Envelope(NamedTuple):
    """Who a message comes from and who gets it (RFC 5321), spelt as in its header.

    `hidden` are the recipients that only the Bcc field names.
    """

    sender: str
    recipients: tuple[str, ...]
    hidden: tuple[str, ...] = ()


class Signer(NamedTuple):
    """A private key, the certificate that belongs to it, and the certificates above that one."""

    key: PrivateKey
    certificate: x509.Certificate
    chain: Certificates


class Receipt(NamedTuple):
    """What became of one copy of a message: who has it, why others have not, and the lines that tell of those.

    `unknown` counts those of the refused who have it too: the API does not say which. `temporary` tells that every
    refusal may be gone later, `lost` that the server is gone. Those `left` were too many for one transaction
    (452, RFC 5321 section 4.5.3.1.10) and get another one.
    """

    accepted: tuple[str, ...]
    refused: Mapping[str, str]
    errors: Sequence[str] = ()
    temporary: bool = True
    lost: bool = False
    unknown: int = 0
    identifier: str = ""
    left: tuple[str, ...] = ()

    @property
    def reached(self) -> int:
        """How many have it."""
        return len(self.accepted) + self.unknown

    def plus(self, other: "Receipt") -> "Receipt":
        """What became of this copy and another one of the same message."""
        return Receipt(
            accepted=self.accepted + other.accepted,
            refused={**self.refused, **other.refused},
            errors=list(dict.fromkeys([*self.errors, *other.errors])),
            temporary=self.temporary and other.temporary,
            lost=other.lost,
            unknown=self.unknown + other.unknown,
            identifier=self.identifier or other.identifier,
        )


class Prepared(NamedTuple):
    """A message made ready: its copies, with the envelope of each, and the lines that tell who it is from and for."""

    copies: list[tuple[bytes, Envelope]]
    people: list[str]

    @property
    def wanted(self) -> int:
        """How many are to get it."""
        return sum(len(envelope.recipients) for _, envelope in self.copies)


class Outcome(NamedTuple):
    """What became of a message file: exit code, None where another run has it, and what to print and to report."""

    file: str
    code: int | None
    record: Mapping[str, object]
    remarks: Sequence[str] = ()
    lines: Sequence[str] = ()
    errors: Sequence[str] = ()


# ------------------------------------------------------------------------------------------------ configuration


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Read the command line, as HELP explains it; a wrong one ends the program with exit code 2."""
    usage = "%(prog)s [options] FILE.eml [FILE.eml ...]"
    narrow = partial(HelpFormatter, width=100)  # to ask for the terminal's width takes modules
    parser = ArgumentParser(PROGRAM, usage, formatter_class=narrow, allow_abbrev=False, add_help=False)
    add = parser.add_argument
    add("files", metavar="FILE.eml", nargs="+")
    for name in ("sign", "encrypt", "opaque", "protect_headers", "send_smtp", "send_api", "date_now", "quiet"):
        add(f"--{name}", action="store_true")
    add("--jobs", type=int, default=1)
    add("--recipient", action="append", default=[])
    for name in ("ca_file", "env_file", "return_path", "report", "sent"):
        add(f"--{name}")
    add("--archive", action="append", default=[])
    add("--cipher", choices=("aes256-cbc", "aes256-gcm"), default="aes256-cbc")
    add("--rsa_padding", choices=("pkcs1v15", "pss_oaep"), default="pkcs1v15")
    add("--keys", default=".")
    add("--skip_checks", action="extend", type=lambda text: text.split(","), default=[])
    add("--version", action="version", version=f"{PROGRAM} {VERSION}")
    options = parser.parse_args(argv, Options())
    if options.send_smtp and options.send_api:
        parser.error("--send_smtp and --send_api are two ways: choose one")
    if options.opaque and not options.sign:
        parser.error("--opaque is a way to sign: add --sign")
    if options.protect_headers and not options.protects:
        parser.error("--protect_headers needs a signature or encryption: add --sign or --encrypt")
    if options.archive and not options.encrypt:
        parser.error("--archive is about encrypted messages: add --encrypt")
    if "" in (options.ca_file, options.env_file, options.sent, options.report):
        parser.error("--ca_file, --env_file, --sent and --report need a name: is a variable of your shell empty?")
    if options.jobs < 1:
        parser.error("--jobs must be 1 or more")
    if options.sent and (not options.sends or "-" in options.files):
        parser.error("--sent moves files that are sent: add --send_smtp or --send_api, and name no -")
    if "-" in options.files and len(options.files) > 1:
        parser.error("standard input, -, is one message: name no files beside it")
    if unknown := set(options.skip_checks) - set(CHECKS):
        parser.error(f"--skip_checks knows {', '.join(CHECKS)}, not {', '.join(sorted(unknown))}")
    return options


def read_environment(environ: Mapping[str, str], env_file: str | None) -> Mapping[str, str]:
    """The variables of the environment, and below them those of the settings file, which is never executed.

    An empty variable counts as not set: it takes nothing from the file away, such as the TLS that it demands.
    Raises Error for a file that cannot be read, or that other users could read or write.
    """
    path = "my_envs.sh" if env_file is None else env_file
    if env_file is None and not os.path.lexists(path):
        return environ
    import logging

    from dotenv import dotenv_values

    logging.basicConfig(format=f"{PROGRAM}: {path.replace('%', '%%')}: %(message)s")  # for what it cannot read
    try:
        content = read_file(path, secret=True, owned=True).decode()
    except UnicodeDecodeError:
        raise Error(f"{path}: this settings file is not UTF-8 text") from None
    values = dotenv_values(stream=io.StringIO(content), interpolate=False)
    return {name: text for name in (*values, *environ) if (text := environ.get(name) or values.get(name))}


def read_settings(environ: Mapping[str, str], options: Options) -> Settings:
    """Check the variables that this run needs, before anything else is read. Raises Error."""
    if options.send_smtp:
        require(environ, "SMTP_HOST", "SMTP_USER", "SMTP_PASSWORD")
    if options.send_api:
        require(environ, "SPARKPOST_API_KEY")
    settings = Settings(
        smtp_host=environ.get("SMTP_HOST", ""),
        smtp_port=port_number(environ.get("SMTP_PORT") or "25", "SMTP_PORT") if options.send_smtp else 0,
        smtp_user=environ.get("SMTP_USER", ""),
        smtp_password=environ.get("SMTP_PASSWORD", ""),
        smtp_tls=environ.get("SMTP_TLS") or "auto",
        smtp_ca_file=environ.get("SMTP_CA_FILE", ""),
        api_key=environ.get("SPARKPOST_API_KEY", ""),
        api_host=api_url(environ.get("SPARKPOST_HOST") or "https://api.sparkpost.com") if options.send_api else "",
        key_password=environ.get("SMIME_KEY_PASSWORD", ""),
        ca_file=options.ca_file or environ.get("SMIME_CA_FILE", ""),
    )
    if options.send_smtp and settings.smtp_tls not in ("auto", "verify", "off"):
        raise Error(f"SMTP_TLS is {settings.smtp_tls!r}", "it must be auto, verify or off")
    return settings


def require(environ: Mapping[str, str], name: str, *others: str) -> None:
    """Raise Error where this variable is not set, or where it or the others hold what the network cannot carry."""
    if not environ.get(name):
        raise Error(f"Environment var {name} not set - stopping", prefix="")
    for each in (name, *others):
        value = environ.get(each, "")
        if not (value.isascii() and value.isprintable()):
            raise Error(f"{each} holds a line break or a character outside ASCII", "set it anew")


def port_number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6) or not 0 < int(text) < 1 << 16:
        raise Error(f"{name} is {text[:20]!r}", "a port is a number from 1 to 65535")
    return int(text)


def api_url(host: str) -> str:
    """The base of the API's address. Raises Error for one that would send the key in the clear."""
    url = re.fullmatch(r"(?a)(?:(https?)://)?([\w-]{1,63}(?:\.[\w-]{1,63})*|\[[\dA-Fa-f:]+\])(?::(\d+))?/?", host)
    if not url:
        raise Error("SPARKPOST_HOST is no address of an API", "it must be like https://api.eu.sparkpost.com")
    scheme, name, port = url[1] or "https", url[2], url[3] or ""
    if scheme == "http" and not is_loopback(name.strip("[]")):
        raise Error("SPARKPOST_HOST with http:// would send the API key unencrypted", f"use https://{name}")
    return f"{scheme}://{name}" + (f":{port_number(port, 'the port in SPARKPOST_HOST')}" if port else "")


def is_loopback(host: str) -> bool:
    """Whether this host name or numeric address never leaves the machine."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host.lower() == "localhost"


def read_file(path: str, *, secret: bool = False, owned: bool = False) -> bytes:
    """The bytes of a file, or of standard input for `-`.

    Raises Error when it cannot be read, when it is secret but others could read it, or when another user owns it.
    """
    with system_errors(path), open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
        status = os.fstat(file.fileno())
        if owned and status.st_uid != os.geteuid():
            raise unsafe(path, "this file belongs to another user", f"chown {os.geteuid()}")
        if secret and status.st_mode & 0o077:
            raise unsafe(path, "other users can read or change this file", f"chmod {'0700' if owned else '0600'}")
        content = file.read()
        now = os.fstat(file.fileno())
        if S_ISREG(now.st_mode) and (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            raise TemporaryError(f"{path}: this file is being written", "let it be complete before it is sent")
        return content


def unsafe(path: str, what: str, cure: str) -> Error:
    from shlex import quote

    return Error(f"{path}: {what}", f"{cure} {quote(path)}")


# ------------------------------------------------------------------------------------- message: fields, envelope

FIELD = rb"(?:>?From (?![ \t]*:)[^\n]*\n)*([!-9;-~]+[ \t]*:[^\n]*(?:\n[ \t][^\n]*)*)(?:\n|\Z)"
QUOTED = r'(?<!\\)"(?:[^"\\]|\\.)*"'
ATOM = r'[^\s\x00-\x20\x7f"(),:;<>@\[\\\]]+'
ADDRESS = rf"(?s)(?:{QUOTED}|{ATOM})@(?:{ATOM}|\[[!-Z^-~]+\])"
NAME = rf'(?:{QUOTED}|\[[^\[\]]*\]|[^"<>\[\],;:])*'
BRACKETED = rf'(?s){NAME}<(?:@[^:<>]*:)?((?:{QUOTED}|[^<>"])*)>'
# the name of a group, a mailbox, or what is neither
LISTED = rf'(?s)(?:{QUOTED}|\[[^\[\]@]*\]|[^"<>\[\],;:@])*:|({NAME}(?:<(?:{QUOTED}|[^<>"])*>{NAME})*)(?:[,;]|\Z)|(.+)'


def split_entity(entity: bytes) -> tuple[list[bytes], bytes, bytes]:
    """Cut an entity into header fields, the blank line after them, if there is one, and body.

    The fields are folded with CRLF and lack the last one; the body stays as it came. The header ends at the first line
    that is no field (RFC 5322 section 2.1); mbox "From " lines before a field are dropped.
    """
    fields, end = [], 0
    while match := re.compile(FIELD).match(entity, end):
        fields.append(to_crlf(match[1].rstrip(b"\r")))
        end = match.end()
    blank = re.compile(rb"\r?\n").match(entity, end)
    return fields, CRLF if blank else b"", entity[blank.end() if blank else end :]


def joined(fields: Iterable[bytes]) -> bytes:
    """These fields as lines of a header."""
    return b"".join(field + CRLF for field in fields)


def to_crlf(data: bytes) -> bytes:
    """Make CRLF of every line end, be it CRLF or LF."""
    if b"\r" not in data:
        return data.replace(b"\n", CRLF)
    return data if data.count(b"\n") == data.count(CRLF) else data.replace(CRLF, b"\n").replace(b"\n", CRLF)


def to_text(raw: bytes) -> str:
    """Read as UTF-8, else as Latin-1, in which all bytes are text."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


@lru_cache(maxsize=1024)
def field_name(field: bytes) -> str:
    return field.partition(b":")[0].strip().lower().decode()


def field_texts(fields: Iterable[bytes], name: str) -> list[str]:
    """The values of all fields of that name, unfolded (RFC 5322 section 2.2.3)."""
    found = [field for field in fields if field_name(field) == name]
    return [to_text(field.partition(b":")[2].replace(CRLF, b"")).strip() for field in found]


def read_envelope(fields: Sequence[bytes], return_path: str | None, named: Sequence[str] = ()) -> Envelope:
    """Who the message comes from, and every address of To, Cc and Bcc, each once; or of the recipients `named` instead.

    Resent- fields tell of an earlier journey (RFC 5322 section 3.6.6), so they name no recipients. Raises Error.
    """
    sender = author(fields, "sender", "from")
    if return_path is not None:
        sender = "" if return_path in ("", "<>") else parse_mailbox(return_path, "--return_path")
    shown = unique(addresses(fields, "to", "cc"))
    hidden = unique([*shown, *addresses(fields, "bcc")])[len(shown) :]
    if named:
        listed = set(map(same_address, shown))
        everyone = unique(parse_mailbox(address, "--recipient") for address in named)
        shown = tuple(address for address in everyone if same_address(address) in listed)
        hidden = tuple(address for address in everyone if same_address(address) not in listed)
    if not shown and not hidden:
        raise Error("the message has no recipient", "name one in a To, Cc or Bcc field")
    return Envelope(sender, shown, hidden)


def unique(mailboxes: Iterable[str]) -> tuple[str, ...]:
    """Each mailbox once, as first spelt; in a domain neither case (RFC 5321 section 2.4) nor U- or A-labels count."""
    found: dict[tuple[str, str], str] = {}
    for address in mailboxes:
        local, _, domain = wire_address(address).rpartition("@")
        found.setdefault((local, domain.lower()), address)
    return tuple(found.values())


def author(fields: Sequence[bytes], *names: str) -> str:
    """The address in the first of these fields, From or Sender, that holds exactly one. Raises Error.

    Several authors in From need a Sender (RFC 5322 section 3.6.2).
    """
    if not addresses(fields, "from"):
        raise Error("the message has no sender", "name one in a From field, above the first blank line")
    for name in names:
        if len(found := addresses(fields, name)) == 1:
            return found[0]
    raise Error("the From field names several addresses", "add a Sender field with the one that sends")


def addresses(fields: Iterable[bytes], *names: str) -> list[str]:
    """The addresses in all fields of these names, in order. Raises Error."""
    return [address for name in names for value in field_texts(fields, name) for address in parse_list(value, name)]


@lru_cache(maxsize=1024)
def parse_list(value: str, name: str) -> tuple[str, ...]:
    """The addresses in the value of a field, groups dissolved (RFC 5322 section 3.4).

    The standard library's two parsers lose or invent recipients in lists that are slightly wrong, each Python
    version in its own way, and do not tell; this one takes every address or raises Error.
    """
    parts = ["".join(groups).strip() for groups in re.findall(LISTED, without_comments(value))]
    return tuple(parse_mailbox(part, name) for part in parts if part)


def without_comments(text: str) -> str:
    """A field's value with its (comments), which nest (RFC 5322 section 3.2.2), blanked; as it is where one is open."""
    if "(" not in text:
        return text
    depth, quoted, kept = 0, False, []
    for token in re.findall(r'(?s)\\.|["()]|[^\\"()]+|\\', text):
        quoted ^= token == '"' and not depth
        depth += token == "(" and not quoted
        kept.append(" " * len(token) if depth else token)
        depth -= token == ")" and depth > 0
    return text if depth else "".join(kept)


def parse_mailbox(mailbox: str, name: str) -> str:
    """The address in `Name <address>` or `address`. Raises Error."""
    bracketed = re.fullmatch(BRACKETED, mailbox)
    spaced = (bracketed[1] if bracketed else mailbox).strip()
    close = rf"({QUOTED})|(?<!\s)\s*([.@])\s*"  # RFC 5322 section 4.4
    address = re.sub(close, lambda match: match[1] or match[2], spaced)
    odd = not mailbox.isprintable() and re.search(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]", mailbox)  # slow to compile
    if odd or not re.fullmatch(ADDRESS, address):
        where = name if name.startswith("--") else f"the {name} field"
        raise Error(f"{where} holds an address that cannot be read: {mailbox[:80]!r}", "write Name <user@domain>")
    return address


def wire_address(address: str) -> str:
    """Spell a domain outside ASCII in A-labels (RFC 5890 section 2.3.2.1), which every mail server reads.

    Not by the idna codec: it follows the older RFC 3490 and would send mail for faß.de to fass.de.
    """
    if address.isascii():
        return address
    local, at, domain = address.rpartition("@")
    labels = unicodedata.normalize("NFC", domain.lower()).split(".")
    encoded = (label if label.isascii() else "xn--" + label.encode("punycode").decode() for label in labels)
    return local + at + ".".join(encoded)


# ----------------------------------------------------------------------------- message: header fit for transport

# raw words, with the blanks between them and encoded words: to be shown these must be encoded, RFC 2047 section 6.2
RUN = rb"(?:(?<=[^\s?]\?=)\s+)?%b(?:\s+%b)*(?:\s+(?==\?[^?\s]))?"
RAW_WORD = rb"\S*[\x80-\xff]\S*"
UNSTRUCTURED = RUN % (RAW_WORD, RAW_WORD) + rb"|\S+"
BYTES_QUOTED = QUOTED.encode()
BARE_ADDRESS = rb'(?:%b|[^\s"<>(),:;@]+)@[^\s"<>(),;]+(?![^,;<]{0,998}<)' % BYTES_QUOTED  # no name with an @ in it
NAME_WORD = rb'(?:%b|[^\s"<>(),:;]*[\x80-\xff][^\s"<>(),:;]*)' % BYTES_QUOTED
NAME_RUN = RUN % (NAME_WORD, rb"(?!%b)%b" % (BARE_ADDRESS, NAME_WORD))
ADDRESS_LIST = rb'(?s)(?P<address><[^<>]*>|%b)|(?P<phrase>%b)|[^\s"<>(),:;]+' % (BARE_ADDRESS, NAME_RUN)
PARAMETER = rb'(?s)(;\s*[^\s;="*]+)\s*=\s*(%b|[^\s;"]+)' % BYTES_QUOTED
RAW_ENCODED_WORD = rb"=\?([^?\s]+)\?([BbQq])\?(?=[^?\r\n]*[\x80-\xff])([^?\r\n]*)\?="
CONTROLS = rb"\0|\r(?!\n)"
# of a long line what fits, or one word that does not, up to a blank; or all of it, where no word comes after one
FOLDABLE = rb"(?=[^\r\n]{%d})(?:([^\r\n]{0,%d}[^ \t\r\n]|[ \t]*[^ \t\r\n]+)(?=[ \t]+[^ \t\r\n])|[^\r\n]+)"
FOLDABLE %= LONGEST_LINE + 1, LONGEST_LINE - 1
TIGHT_COMMA = rb"(?s)(%b)|,(?=[^ \t\r])" % BYTES_QUOTED


def outer_fields(fields: Iterable[bytes], options: Options, domain: str) -> list[bytes]:
    """The fields that stay outside, in order and fit for transport, with those that every message must have."""
    added = {
        "date": b"Date: " + formatdate(localtime=True).encode(),
        "message-id": b"Message-ID: " + make_msgid(domain=wire_address(domain)).encode(),
        "mime-version": b"MIME-Version: 1.0",
    }
    once = {"mime-version", "date"} if options.date_now else {"mime-version"}
    dropped = DROPPED_FIELDS | ({"dkim-signature"} if options.protects else set())  # it signs the body as it was
    outer, present = list[bytes](), set[str]()
    for field in fields:
        name = field_name(field)
        if name in dropped or (options.protects and name.startswith("content-")) or name in once & present:
            continue
        outer.append(added[name] if options.date_now and name == "date" else fit_field(field))
        present.add(name)
    return outer + [field for name, field in added.items() if name not in present]


def fit_field(field: bytes) -> bytes:
    """Make a field ASCII, without NUL or a lone CR, in lines of at most 998 bytes; one that is so stays as it is."""
    if not field.isascii() or re.search(CONTROLS, field):
        name = field_name(field)
        head, colon, value = re.sub(CONTROLS, b" ", field).partition(b":")
        if name in ("content-type", "content-disposition"):
            value = re.sub(PARAMETER, encode_parameter, value)
        value = re.sub(RAW_ENCODED_WORD, mend_encoded_word, to_text(value).encode())
        field = head + colon + re.sub(ADDRESS_LIST if name in ADDRESS_FIELDS else UNSTRUCTURED, encode_words, value)
    return fold(field)


def trimmed(field: bytes) -> bytes:
    """A field without blanks at its line ends, which mean nothing, and are unfit for a clear signature."""
    return re.sub(rb"(?<![ \t\r\n])[ \t\r\n]+(?=\r\n|\Z)", b"", field)


def fold(field: bytes) -> bytes:
    """Fold the lines of more than 998 bytes in a field before the white space in them (RFC 5322 section 2.2.3).

    A list of addresses may have white space after each comma, and gets it where it has such a line.
    """
    if not has_long_line(field):
        return field
    if field_name(field) in ADDRESS_FIELDS:
        field = re.sub(TIGHT_COMMA, lambda match: match[1] or b", ", field)
    return re.sub(FOLDABLE, lambda match: match[1] + CRLF if match[1] else match[0], field)


def encode_words(match: re.Match[bytes]) -> bytes:
    """Turn raw words into encoded words of at most 75 bytes (RFC 2047 section 2), except in addresses (RFC 6532)."""
    words = match[0]
    if words.isascii():
        return words
    if match.lastgroup == "address":
        return re.sub(rb"[^<>]+", lambda inner: wire_address(inner[0].decode()).encode(), words)
    if match.lastgroup == "phrase":
        words = re.sub(BYTES_QUOTED, unquoted, words)
    chunks = re.findall(rb"(?s).{1,45}(?![\x80-\xbf])", words.replace(CRLF, b""))  # cut between characters, section 5
    encoded = b"\r\n ".join(b"=?utf-8?B?%b?=" % b2a_base64(chunk, newline=False) for chunk in chunks)
    # nothing but white space or the parentheses of a comment may touch an encoded word, section 5
    left, right = match.string[match.start() - 1 : match.start()], match.string[match.end() : match.end() + 1]
    return (b"" if left in b" \t\n(" else b" ") + encoded + (b"" if right in b" \t\r)" else b" ")


def unquoted(quoted: re.Match[bytes]) -> bytes:
    """What a quoted string holds (RFC 5322 section 3.2.4)."""
    return re.sub(rb"(?s)\\(.)", rb"\1", quoted[0][1:-1])


def mend_encoded_word(match: re.Match[bytes]) -> bytes:
    """Encode the raw text in an encoded word, in the character set that the word names."""
    charset, encoding, text = match.groups()
    with suppress(LookupError, ValueError):  # in a character set that Python or the text does not know the bytes stay
        text = text.decode().encode(charset.decode("ascii"))
    if encoding in b"Bb":
        text = re.sub(rb"[^A-Za-z0-9+/=]", b"", text)
    else:
        text = re.sub(rb"[^!-~]", lambda raw: b"=%02X" % ord(raw[0]), text)
    return b"=?%b?%b?%b?=" % (charset, encoding, text)


def encode_parameter(match: re.Match[bytes]) -> bytes:
    """Encode the raw bytes of a parameter such as filename (RFC 2231 section 4).

    No character set is named, for the message names none: readers go on guessing, as with the raw bytes.
    """
    name, value = match.groups()
    if value.isascii():
        return match[0]
    return name + b"*=" + quote_from_bytes(re.sub(BYTES_QUOTED, unquoted, value), safe="").encode()


# ----------------------------------------------------------------------------- message: entity fit for transport

EIGHT_BIT = rb"[ \t]*:[^\n]*(?:\n[ \t][^\n]*)?(?:8bit|binary)"


def make_entity(fields: Iterable[bytes], body: bytes, *, clear: bool) -> bytes:
    """The MIME entity of a message, its Content- fields and its body, fit for transport.

    `clear` asks for what a clear signature needs on top. Raises Error where that cannot be had.
    """
    content = [f for f in fields if field_name(f).startswith("content-") and field_name(f) not in DROPPED_FIELDS]
    if not field_texts(content, "content-type"):
        field = b"Content-Type: text/plain"
        if not body.isascii():
            field += b"; charset=utf-8" if to_text(body).encode() == body else b"; charset=iso-8859-1"
        content.insert(0, field)
    return fit_entity(body, header=joined(content) + CRLF, clear=clear)


def is_fit(entity: bytes, *, clear: bool) -> bool:
    """Whether mail servers carry these bytes, in which every LF follows a CR, unaltered (RFC 8551 section 3.1).

    Under a clear signature, "From " at the start of a line and blanks at its end are at risk too.
    """
    return (
        entity.isascii()
        and b"\0" not in entity
        and entity.count(b"\r") == entity.count(b"\n")
        and not has_long_line(entity)
        and not (clear and (entity.startswith(b"From ") or b"\nFrom " in entity or entity.endswith((b" ", b"\t"))))
        and not (clear and entity.rfind(b" \r") >= 0)  # faster than in
        and not (clear and b"\t" in entity and entity.rfind(b"\t\r") >= 0)  # a tab is rare, and found faster
    )


def has_long_line(entity: bytes) -> bool:
    """Whether a line has over 998 bytes before its CRLF; searches back from where each line must have ended."""
    start = 0
    while len(entity) - start > LONGEST_LINE:
        start = entity.rfind(b"\n", start, start + LONGEST_LINE + 2) + 1
        if not start:
            return True
    return False


def is_called_eight_bit(entity: bytes) -> bool:
    """Whether a part says that it is 8bit or binary; piece by piece, to spare memory."""
    pieces = (entity[start : start + 66_000].lower() for start in range(0, len(entity), 65_000))
    values = (value for piece in pieces for value in piece.split(b"content-transfer-encoding")[1:])
    return any(re.match(EIGHT_BIT, value) for value in values)


def fit_entity(raw: bytes, *, header: bytes = b"", clear: bool, default: str = "text/plain", depth: int = 0) -> bytes:
    """The entity with CRLF line ends; what is unfit for transport in it is re-encoded, part by part.

    `header` holds fields that come before it. A part already signed is left alone. `default` is the type of an entity
    that names none. Raises Error.
    """
    entity = header + to_crlf(raw)
    if is_fit(entity, clear=clear) and not is_called_eight_bit(entity):
        return entity
    if depth == DEEPEST_NESTING:
        raise Error(f"the message has parts in parts, more than {DEEPEST_NESTING} deep")
    fields, blank, body = split_entity(header + raw)
    kind, boundary, _ = media_type(fields, default)
    encoding = transfer_encoding(fields)
    inner = "message/rfc822" if kind == "multipart/digest" else "text/plain"  # RFC 2046 section 5.1.5
    fit_inner = partial(fit_entity, clear=clear, default=inner, depth=depth + 1)
    if kind.startswith("multipart/") and boundary and (parts := fit_parts(body, boundary, fit_inner, clear=clear)):
        body = parts
    elif kind in ("message/rfc822", "message/global") and encoding not in ("base64", "quoted-printable"):
        body = fit_inner(body)
    else:
        encoding, body = fit_leaf(body, kind, encoding, clear=clear)
    encoding = "7bit" if encoding in ("8bit", "binary") else encoding  # Postfix re-encodes a part called so, even ASCII
    fields = [fit_field(field) for field in with_transfer_encoding(fields, encoding)]
    fit = joined(map(trimmed, fields) if clear else fields) + (CRLF if body else blank) + body
    if kind == "multipart/signed" and fit != entity:
        if clear:
            raise Error("the message holds a signed part, unfit for a clear signature around it", "use --opaque")
        return entity
    if clear and not is_fit(fit, clear=True):
        raise Error("a part has a header that is unfit for a clear signature, and no encoding can help", "use --opaque")
    return fit


def media_type(fields: Iterable[bytes], default: str = "text/plain") -> tuple[str, str, str]:
    """Type, boundary and character set as the standard library reads them; empty where it cannot."""
    entity = Message()
    entity.set_default_type(default)
    for value in field_texts(fields, "content-type")[:1]:
        entity["Content-Type"] = value
    boundary = charset = ""
    with suppress(ValueError, LookupError, TypeError):  # a parameter in RFC 2231 form may be nonsense
        boundary = entity.get_boundary("")
        charset = entity.get_content_charset("us-ascii")
    return entity.get_content_type(), boundary, charset


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
    delimiter = rb"(?:\A|\r?\n)--%b(--)?[ \t]*(?=\r?\n|\Z)" % re.escape(boundary.encode(errors="replace"))

    def fit_piece(piece: bytes) -> bytes:
        if inside:  # the line end after the boundary comes first, unless the next boundary has it
            return CRLF + fit_part(piece.partition(b"\n")[2]) if piece else b""
        text = to_crlf(piece)
        return text if is_fit(text, clear=clear) else b""

    pieces, end, inside = list[bytes](), 0, False
    for match in re.finditer(delimiter, body):
        pieces += [fit_piece(body[end : match.start()]), to_crlf(match[0]).rstrip()]
        end, inside = match.end(), not match[1]
        if not inside:
            break
    return b"".join([*pieces, fit_piece(body[end:])]) if pieces else None


def fit_leaf(body: bytes, kind: str, encoding: str, *, clear: bool) -> tuple[str, bytes]:
    """Encoding and body of a part that holds no parts, re-encoded where it is unfit; it decodes to the same bytes."""
    is_text = kind.startswith(("text/", "multipart/")) or kind in FIELD_TYPES
    if kind.startswith("message/") and not is_text:  # not to be encoded, RFC 2046 section 5.2
        return encoding, to_crlf(body)
    if encoding != "binary" or is_text:  # binary data has no line ends to be made CRLF
        body = to_crlf(body)
        if clear and kind in FIELD_TYPES:  # blanks at their line ends mean nothing, as in a header
            body = re.sub(rb"(?<![ \t])[ \t]+(?=\r\n|\Z)", b"", body)
        if is_fit(body, clear=clear):
            return encoding, body
    if encoding == "base64":  # what is outside its alphabet has no meaning, RFC 2045 section 6.8
        return encoding, wrap(re.sub(rb"[^A-Za-z0-9+/=]", b"", body))
    body = decoded(body, encoding)
    if is_text and to_crlf(body) == body:
        return "quoted-printable", quoted_printable(body)
    return "base64", base64_lines(body)


def decoded(body: bytes, encoding: str) -> bytes:
    """The body as the standard library decodes it; in an encoding that nobody knows it stays as it is."""
    part = Message()
    part["Content-Transfer-Encoding"] = encoding
    part.set_payload(body.decode("ascii", "surrogateescape"))
    return bytes(part.get_payload(decode=True))


def quoted_printable(data: bytes) -> bytes:
    """RFC 2045 section 6.7, for text with line ends of CRLF; keeps "From " off the start of every line."""
    text = CRLF.join(b2a_qp(line, istext=False).replace(b"\n", CRLF) for line in data.split(CRLF))
    return re.sub(rb"(?m)^From ", b"=46=\r\nrom ", text)


def base64_lines(data: bytes, before: bytes = b"") -> bytes:
    """Base64 in lines of 76 characters (RFC 2045 section 6.8), written piece by piece to spare memory."""
    lines = io.BytesIO(bytes(len(before) + (len(data) + 56) // 57 * 78))  # growing it could take twice the memory
    lines.write(before)
    piece = 57 * 1024  # 57 bytes make a line
    for start in range(0, len(data), piece):
        lines.write(CRLF if start else b"")
        lines.write(wrap(b2a_base64(data[start : start + piece], newline=False)))
    lines.truncate()
    return lines.getvalue()


def wrap(text: bytes) -> bytes:
    lines, rest = divmod(len(text), 76)
    return CRLF.join(unpack("76s" * lines + f"{rest}s" * bool(rest), text))


# --------------------------------------------------------------------------------- message: header protection

COMMENT_OR_BODY = r"""(?is)<!--.*?(?:-->|\Z)|<body\b(?:"[^"]*"|'[^']*'|[^'"<>])*>"""
CONFIDENTIAL = {"subject": b"Subject: [...]", "comments": b"", "keywords": b"", "thread-topic": b""}
MAIN_TEXT_TYPES = ("multipart/alternative", "multipart/mixed", "multipart/related")


def protect_headers(entity: bytes, header: Iterable[bytes], *, hide: bool) -> tuple[bytes, list[bytes]]:
    """The entity with the header fields in it, and those that stay outside (RFC 9788 section 5.2).

    `hide` puts Subject, Comments and Keywords out of reach of those who cannot decrypt (hcp_baseline, section 3.2.1),
    and Thread-Topic, in which Outlook repeats the Subject; and it shows the Subject in the text where readers do not
    know of header protection (section 5.2.2).
    """
    header = [field for field in header if field_name(field) != "hp-outer"]  # only those made here may be believed
    outer, line = header, ""
    if hide:
        outer = list(filter(None, (CONFIDENTIAL.get(field_name(field), field) for field in header)))
        hidden = [text for text in field_texts(header, "subject") if text not in ("", "[...]")]
        line = f"Subject: {readable(hidden[0])}" if hidden else ""
    fields, _, body = split_entity(with_legacy_display(entity, line))
    inner = tidied(header) + [b"HP-Outer: " + field for field in tidied(outer) if hide]
    fields = with_parameter(fields, b"hp", b"cipher" if hide else b"clear")
    return joined([*map(fold, inner), *fields]) + CRLF + body, outer


def tidied(header: Iterable[bytes]) -> list[bytes]:
    """The fields but MIME-Version as `Name: value` (RFC 9788 section 2.2), fit for a clear signature."""
    parts = [trimmed(field).partition(b":") for field in header if field_name(field) != "mime-version"]
    return [(name.rstrip() + b": " + value.lstrip()).rstrip() for name, _, value in parts]


def readable(value: str) -> str:
    """A field's value in one line, encoded words (RFC 2047) decoded as far as they can be."""
    with suppress(HeaderParseError, LookupError, ValueError):  # shown as it came
        value = str(make_header(decode_header(value)))
    return " ".join(value.split())


def with_parameter(fields: Iterable[bytes], name: bytes, value: bytes) -> list[bytes]:
    """The fields, with this parameter in Content-Type in place of the author's own; an empty one removes that."""
    old = rb"(?si)(%b)|;\s*%b(?:\*\d*\*?)?\s*=\s*(?:%b|[^\s;]*)" % (BYTES_QUOTED, name, BYTES_QUOTED)
    parameter = b';\r\n\t%b="%b"' % (name, value) if value else b""

    def changed(field: bytes) -> bytes:
        bare = without_comments(field.decode("latin-1")).encode("latin-1")  # each byte is where it was
        kind = bare.partition(b";")[0]
        gone = [match.span() for match in re.compile(old).finditer(bare, len(kind)) if not match[1]]
        starts, ends = [len(kind), *(end for _, end in gone)], [*(start for start, _ in gone), len(field)]
        others = b"".join(field[start:end] for start, end in zip(starts, ends, strict=True))
        others = others.removeprefix(b";").rstrip(b"; \t\r\n")
        first = b" ".join(kind.split()) + parameter  # where nothing odd can hide it
        return first + b";" + others if others else first

    return [changed(field) if field_name(field) == "content-type" else field for field in fields]


def with_legacy_display(entity: bytes, line: str, *, depth: int = 0) -> bytes:
    """The entity, with this line shown in each part that is its main text.

    No part goes on claiming that it shows a line where it does not, for readers would then cut off its first line.
    """
    if depth == DEEPEST_NESTING or not (line or b"hp-legacy-display" in entity.lower()):
        return entity
    fields, _, body = split_entity(entity)
    kind, boundary, charset = media_type(fields)
    if any(text.lower().startswith("attachment") for text in field_texts(fields, "content-disposition")):
        line = ""
    if kind in ("text/plain", "text/html"):
        fields, body = with_line(fields, body, line, charset, html=kind == "text/html")
    elif boundary and kind in MAIN_TEXT_TYPES:
        lines = (line if place == 0 or kind == "multipart/alternative" else "" for place in count())
        display = partial(with_legacy_display, depth=depth + 1)
        body = fit_parts(body, boundary, lambda part: display(part, next(lines)), clear=False) or body
    return joined(fields) + CRLF + body


def with_line(fields: list[bytes], body: bytes, line: str, charset: str, *, html: bool) -> tuple[list[bytes], bytes]:
    """Header fields and body of a text part, with this line on top, if there is one and the text can be decoded."""
    from html import escape

    fields, encoding = with_parameter(fields, b"hp-legacy-display", b""), transfer_encoding(fields)
    try:
        text = decoded(body, encoding).decode(charset)
    except (LookupError, ValueError):
        return fields, body
    if not line or ("utf" not in charset and re.search(r"[\x80-\x9f]", text)):  # no Latin-1, but called so
        return fields, body
    if not field_texts(fields, "content-type"):
        fields = [b"Content-Type: text/plain", *fields]
    place, shown = 0, f"{line}\r\n\r\n"
    if html:
        place = next((tag.end() for tag in re.finditer(COMMENT_OR_BODY, text) if tag[0][1] != "!"), 0)
        line = escape(line).replace("&#x27;", "&apos;")
        shown = f'<div class="header-protection-legacy-display"><pre>{line}</pre></div>\r\n'
    content = f"{text[:place]}{shown}{text[place:]}".encode(errors="replace")
    if encoding == "base64":
        body = base64_lines(content)
    else:
        encoding, body = fit_leaf(content, "text/plain", "7bit", clear=True)
    fields = with_transfer_encoding(with_parameter(fields, b"charset", b"utf-8"), encoding)
    return with_parameter(fields, b"hp-legacy-display", b"1"), body


# -------------------------------------------------------------------------------------------------------- keys


class Keyring:
    """The key folder: every signer and every recipient's certificate is loaded and checked once."""

    def __init__(self, options: Options, settings: Settings) -> None:
        """Raises Error where the CA certificates cannot be read."""
        self.folder, self.password, self.skipped = options.keys, settings.key_password, options.skip_checks
        self.roots = read_keys(settings.ca_file)[1] if settings.ca_file else []
        self.now = datetime.now(timezone.utc)
        self.signer, self.certificate = cache(self.load_signer), cache(self.load_recipient)
        self.remarks: list[str] = []  # to warn of

    def load(self, signer: str, recipients: Sequence[str]) -> tuple[Signer | None, dict[str, x509.Certificate]]:
        """The signer, where one is named, and everybody's certificate. Raises one Error that names all at fault."""
        problems = []
        wanted: list[tuple[Callable[[str], object], str]] = [(self.signer, signer)] if signer else []
        wanted += [(self.certificate, address) for address in recipients]
        for load, address in wanted:
            try:
                load(address)
            except Error as error:
                problems.append(error.text)
        if problems:
            raise Error("; ".join(problems))
        return self.signer(signer) if signer else None, {each: self.certificate(each) for each in recipients}

    def load_signer(self, address: str) -> Signer:
        """The key of an address, with its certificate and chain from its file and from ADDRESS.crt. Raises Error."""
        path = key_file(self.folder, address, KEY_SUFFIXES, "put the private key there")
        key, certificates = read_keys(path, self.password, private=True)
        if not isinstance(key, PrivateKey):
            raise Error(f"{path}: this file holds no key that can sign S/MIME", "use RSA or P-256, P-384 or P-521")
        public, files = key.public_key(), dict.fromkeys(certificates, path)
        held = any(each.public_key() == public for each in files)
        if not held or len(files) == 1:  # one alone may have its chain there, or the one that renews it
            cure = "" if held else "put the certificate of the key there"
            path = key_file(self.folder, address, CERTIFICATE_SUFFIXES, cure)
            files = dict.fromkeys(read_keys(path)[1] if path else [], path) | files
        own = {each: file for each, file in files.items() if each.public_key() == public}
        if not own:
            raise Error(f"{path}: no certificate here belongs to the key of {address}", "get the one made for this key")
        chain = [each for each in files if each not in own]
        return Signer(key, self.choose(own, chain, address, "signatures"), chain)

    def load_recipient(self, address: str) -> x509.Certificate:
        """The certificate of an address; those of issuers in its file are passed over. Raises Error."""
        cure = f"a signed message from {address} holds it: see 'Getting key files' in the README"
        path = key_file(self.folder, address, CERTIFICATE_SUFFIXES + KEY_SUFFIXES[1:], cure)
        certificates = read_keys(path, self.password, private=path.endswith(KEY_SUFFIXES))[1]
        own = dict.fromkeys(owned(address, certificates), path)
        if not own:
            raise Error(f"{address}: {path}: only issuers' certificates are in this file", "add its own")
        return self.choose(own, [each for each in certificates if each not in own], address, "encryption")

    def choose(self, own: Sources, chain: Certificates, address: str, purpose: str) -> x509.Certificate:
        """The usable certificate of an address: of those with the fewest faults, the one that began last.

        Raises Error, which tells the faults of each. Warns of the faults in skipped checks, and of an end that is near.
        """
        faults = {each: list(self.faults(each, chain, address, purpose)) for each in own}
        grave = {each: [fault for fault in faults[each] if fault[0] not in self.skipped] for each in own}
        if all(grave.values()):
            which = " with serial number {:X}" if len(own) > 1 else ""
            reasons = [
                f"{address}: {own[each]}: this certificate{which.format(each.serial_number)} {what} - {cure}"
                for each in own
                for _, what, cure in grave[each]
            ]
            raise Error("; ".join(reasons))
        usable = (each for each in own if not grave[each])
        chosen = max(usable, key=lambda each: (-len(faults[each]), each.not_valid_before_utc))
        remarks = [what for _, what, _ in faults[chosen]]
        if not email_addresses(chosen):
            remarks.append("names no address: only its file's name says whose it is")
        if 0 <= (chosen.not_valid_after_utc - self.now).days < 30:
            remarks.append(f"ends on {chosen.not_valid_after_utc:%Y-%m-%d}")
        self.remarks += [f"{address}: {own[chosen]}: this certificate {remark}" for remark in remarks]
        return chosen

    def faults(self, certificate: x509.Certificate, chain: Certificates, address: str, purpose: str) -> Iterator[Fault]:
        """Each check that a certificate fails, what is wrong, and the cure (RFC 8550 sections 3 and 4.4)."""
        begin, end, key = certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.public_key()
        if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
            yield "kind", "holds a key for RSASSA-PSS only", "get one with a plain RSA key"
        elif not is_rsa(certificate) and not (isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in CURVES):
            yield "kind", "holds a key that is neither RSA nor on P-256, P-384 or P-521", "get one that is"
        if not begin <= self.now <= end:
            yield "validity", f"is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}", "get a current one"
        named = email_addresses(certificate)
        if named and same_address(address) not in map(same_address, named):
            yield "address", f"belongs to {', '.join(named)}", f"get the one for {address}"
        usage, extended = extension(certificate, x509.KeyUsage), extension(certificate, x509.ExtendedKeyUsage)
        sealing = "key_encipherment" if is_rsa(certificate) else "key_agreement"
        bits = ("digital_signature", "content_commitment") if purpose == "signatures" else (sealing,)
        if usage and not any(getattr(usage, bit) for bit in bits):
            yield "usage", f"is not for {purpose} (its key usage)", "get one for S/MIME"
        if extended and MAIL_USES.isdisjoint(extended):
            yield "usage", "is not for e-mail (its extended key usage)", "get one for S/MIME"
        if isinstance(key, rsa.RSAPublicKey) and key.key_size < SMALLEST_RSA_KEY:
            yield "key_size", f"holds an RSA key of {key.key_size} bits", f"get one of {SMALLEST_RSA_KEY} or more"
        if self.roots and (gap := chain_fault(certificate, chain, self.roots, min(max(self.now, begin), end))):
            cure = "are its issuers' certificates in its own file, and current?"
            yield "chain", f"has no valid chain to a CA in the CA file ({gap})", cure


def key_file(folder: str, address: str, suffixes: Sequence[str], cure: str) -> str:
    """The path of an address's key file: spelt as the address is, else in lower case. Raises Error.

    Where no cure is named the file need not exist, and the path may be empty.
    """
    if "/" in address or "\0" in address or address.startswith("."):
        raise Error(f"{address}: an address with / or a leading dot names no key file")
    paths = [os.path.join(folder, name + suffix) for name in (address, address.lower()) for suffix in suffixes]
    for path in paths:
        with system_errors(path), suppress(FileNotFoundError, UnicodeEncodeError):
            os.stat(path)
            return path
    if cure:
        raise Error(f"{paths[0]} not found", f"{cure}; --keys names the folder")
    return ""  # nothing is amiss


def read_keys(path: str, password: str = "", *, private: bool = False) -> tuple[Any, Certificates]:
    """The private key in a file, where one is looked for, and its certificates, each once.

    Reads PKCS #12, PEM with whatever text around it, and a certificate in DER. Raises Error, which tells nothing of
    what the file holds.
    """
    data, key = read_file(path, secret=private), None
    bag = private and path.endswith(KEY_SUFFIXES[1:])
    certificates: Certificates = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd serial numbers, about which a user can do nothing
            if bag:
                from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12

                held = unlocked(load_pkcs12, data, password)
                key, certificates = held.key, [each.certificate for each in (held.cert, *held.additional_certs) if each]
            elif private:
                key = unlocked(load_pem_private_key, data, password)
            if not certificates and b"-----BEGIN CERTIFICATE-----" in data:
                certificates = x509.load_pem_x509_certificates(data)
            elif not private:
                certificates = [x509.load_der_x509_certificate(data)]
            for certificate in certificates:  # parsed when first asked for
                certificate.public_key(), certificate.subject, certificate.extensions
    except (ValueError, TypeError, *ODD_CERTIFICATES):
        what, cure = "certificate", "it must hold some in PEM form, or one in DER"
        if bag:
            what, cure = "key or certificate", "it must be PKCS #12, and SMIME_KEY_PASSWORD its passphrase"
        elif private and key is None:
            what, cure = "private key", "it must hold one in PEM form"
            cure = "SMIME_KEY_PASSWORD must be its passphrase" if b"ENCRYPTED" in data else cure
        raise Error(f"{path}: no {what} can be read from this file", cure) from None
    return key, list(dict.fromkeys(certificates))


def unlocked(load: Callable[[bytes, bytes | None], Any], data: bytes, password: str) -> Any:
    """What is loaded with the passphrase, or without it, where only another file needs it. Raises what `load` does."""
    try:
        return load(data, password.encode() or None)
    except (ValueError, TypeError):
        return load(data, None)


def owned(address: str, certificates: Certificates) -> Certificates:
    """Those of the certificates that may be the address's own, rather than an issuer's of another one."""
    names = {each: raw_names(each)[1:] for each in certificates}
    issued = [each for each, (issuer, subject) in names.items() if issuer != subject]  # by another
    issuers = [names[each][0] for each in issued]
    ends = [each for each, (_, subject) in names.items() if subject not in issuers]
    leaves = [each for each in certificates if not getattr(extension(each, x509.BasicConstraints), "ca", False)]
    naming = [each for each in certificates if same_address(address) in map(same_address, email_addresses(each))]
    return (
        [each for each in naming if each in ends or each in leaves]  # a CA of one's own may name the address too
        or [each for each in ends if each in leaves and each in issued]
        or [each for each in ends if each not in issued]  # a root counts where no leaf is
    )


def raw_names(certificate: x509.Certificate) -> tuple[bytes, bytes, bytes]:
    """Serial number, issuer and subject as the bytes in the certificate, however odd (RFC 5280 section 4.1)."""
    der, fields = certificate.tbs_certificate_bytes, list[bytes]()
    der = der[content_start(der) :]
    while der:
        start = content_start(der)
        end = start + (int.from_bytes(der[2:start], "big") or der[1])
        fields += [der[:end]] if der[0] != 0xA0 else []  # the version
        der = der[end:]
    return fields[0], fields[2], fields[4]


def content_start(der: bytes) -> int:
    """Where the content of the first element begins, behind its tag and length (X.690 section 8.1.3)."""
    return 2 + max(0, der[1] - 0x80)


def extension(certificate: x509.Certificate, kind: type[Extension]) -> Extension | None:
    return next((each.value for each in certificate.extensions if isinstance(each.value, kind)), None)


def is_rsa(certificate: x509.Certificate) -> bool:
    return certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSAES_PKCS1_v1_5


def email_addresses(certificate: x509.Certificate) -> list[str]:
    """The addresses in a certificate's alternative names and subject (RFC 8550 section 3, RFC 9598)."""
    found = []
    for name in extension(certificate, x509.SubjectAlternativeName) or ():
        if isinstance(name, x509.RFC822Name):
            found.append(name.value)
        elif isinstance(name, x509.OtherName) and name.type_id.dotted_string == SMTP_UTF8_MAILBOX:
            found.append(name.value[content_start(name.value) :].decode(errors="replace"))  # a DER UTF8String
    return found + [str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS)]


def same_address(address: str) -> str:
    """What two spellings of an address have in common; mail readers take no account of case either."""
    return wire_address(address).encode(errors="surrogateescape").lower().decode(errors="replace")  # in ASCII alone


def chain_fault(certificate: x509.Certificate, chain: Certificates, roots: Certificates, moment: datetime) -> str:
    """Why no chain leads from a certificate to a root at this moment (RFC 5280 section 6); empty where one does."""
    from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

    def check(_: object, __: object, usage: Any) -> None:
        if isinstance(usage, x509.KeyUsage) and not usage.key_cert_sign:
            raise ValueError("its issuer is not for certificates")
        if isinstance(usage, x509.ExtendedKeyUsage) and MAIL_USES.isdisjoint(usage):
            raise ValueError("its issuer is not for e-mail")

    policies = (x509.CertificatePolicies, Criticality.AGNOSTIC, None)  # any will do
    leaf = ExtensionPolicy.permit_all().may_be_present(*policies)  # a leaf has checks of its own
    issuer = ExtensionPolicy.webpki_defaults_ca().may_be_present(*policies)
    for kind in (x509.ExtendedKeyUsage, x509.KeyUsage):
        issuer = issuer.may_be_present(kind, Criticality.AGNOSTIC, check)
    builder = PolicyBuilder().store(Store(roots)).time(moment).extension_policies(ca_policy=issuer, ee_policy=leaf)
    try:
        path = builder.build_client_verifier().verify(certificate, chain).chain
    except VerificationError as error:
        return str(error)
    names = extension(certificate, x509.SubjectAlternativeName)
    compared = names.get_values_for_type(x509.RFC822Name) if names else []  # the library looks at no other addresses
    limited = any(extension(each, x509.NameConstraints) for each in path[1:])
    return "an issuer is limited to names" if limited and not set(email_addresses(certificate)) <= {*compared} else ""


# ------------------------------------------------------------------------------------------------------ S/MIME


def sign(entity: bytes, signer: Signer, *, opaque: bool, pss: bool) -> bytes:
    """A signed entity: multipart/signed (RFC 8551 section 3.5.3), or signed-data if opaque (section 3.5.2).

    With `pss`, an RSA key signs by RSASSA-PSS with a salt as long as the digest (RFC 4056).
    """
    pss = pss and isinstance(signer.key, rsa.RSAPrivateKey)
    scheme = padding.PSS(padding.MGF1(SHA256()), padding.PSS.DIGEST_LENGTH) if pss else None
    builder = pkcs7.PKCS7SignatureBuilder().set_data(entity)
    builder = builder.add_signer(signer.certificate, signer.key, SHA256(), rsa_padding=scheme)
    for certificate in signer.chain:  # last, because the calls above drop what was added before
        builder = builder.add_certificate(certificate)
    detached = [] if opaque else [pkcs7.PKCS7Options.DetachedSignature]
    try:
        signature = builder.sign(Encoding.DER, [pkcs7.PKCS7Options.Binary, *detached])
    except ValueError:
        raise Error("the signer's key is too small to sign so", "use one of 2048 bits or more") from None
    if opaque:
        return cms_entity("mime; smime-type=signed-data", signature)
    while (boundary := b"----=_" + os.urandom(16).hex().encode()) in entity:
        pass
    start = (
        b'Content-Type: multipart/signed; protocol="application/pkcs7-signature";\r\n\tmicalg=sha-256; boundary="%b"'
        b"\r\n\r\nThis message is signed with S/MIME.\r\n--%b\r\n"
    ) % (boundary, boundary)
    sealed = cms_entity("signature", signature, b"\r\n--%b\r\n" % boundary, name="smime.p7s")
    return b"".join((start, entity, sealed, b"\r\n--%b--\r\n" % boundary))


def encrypt(entity: bytes, certificates: Certificates, *, gcm: bool, oaep: bool, before: bytes = b"") -> bytes:
    """An encrypted entity that any of these certificates' keys opens (RFC 8551 section 3.3). Raises Error.

    `before` is the header that comes before it; to add it here spares a copy.
    """
    recipients = list(dict.fromkeys(certificates))
    try:
        if gcm or oaep or not all(map(is_rsa, recipients)):
            der = enveloped_data(entity, recipients, gcm=gcm, oaep=oaep)
        else:
            builder = pkcs7.PKCS7EnvelopeBuilder().set_data(entity).set_content_encryption_algorithm(AES256)
            for certificate in recipients:
                builder = builder.add_recipient(certificate)
            der = builder.encrypt(Encoding.DER, [pkcs7.PKCS7Options.Binary])
    except ValueError:
        raise Error("a recipient's certificate holds a key that cannot encrypt", "ask for a new one") from None
    return cms_entity(f"mime; smime-type={'authEnveloped' if gcm else 'enveloped'}-data", der, before)


def cms_entity(kind: str, der: bytes, before: bytes = b"", *, name: str = "smime.p7m") -> bytes:
    """A CMS object as a MIME entity (RFC 8551 section 3.2)."""
    header = f"Content-Type: application/pkcs7-{kind};\r\n\tname={name}\r\nContent-Transfer-Encoding: base64\r\n"
    header += f"Content-Disposition: attachment; filename={name}\r\n\r\n"
    return base64_lines(der, before + header.encode())


# ------------------------------------------------------------- CMS in DER, where the PKCS7 builders cannot make it


def enveloped_data(content: bytes, certificates: Certificates, *, gcm: bool, oaep: bool) -> bytes:
    """EnvelopedData (RFC 5652 section 6), or AuthEnvelopedData with AES-GCM (RFC 5083, RFC 5084). Raises ValueError."""
    from cryptography.hazmat.primitives.ciphers import Cipher, aead, modes
    from cryptography.hazmat.primitives.padding import PKCS7

    key, nonce = os.urandom(32), os.urandom(12 if gcm else 16)
    if gcm:
        sealed = aead.AESGCM(key).encrypt(nonce, content, None)
        sealed, tag = sealed[:-16], octets(sealed[-16:])
        algorithm = sequence(oid("2.16.840.1.101.3.4.1.46"), sequence(octets(nonce), integer(16)))
    else:
        pad, cipher = PKCS7(128).padder(), Cipher(AES256(key), modes.CBC(nonce)).encryptor()
        sealed, tag = cipher.update(pad.update(content) + pad.finalize()) + cipher.finalize(), b""
        algorithm = sequence(oid("2.16.840.1.101.3.4.1.42"), octets(nonce))
    infos = sorted(recipient_info(each, key, oaep=oaep) for each in certificates)  # a SET OF, X.690 section 11.6
    version = 0 if gcm or all(info[0] == 0x30 for info in infos) else 2
    content_info = sequence(oid("1.2.840.113549.1.7.1"), algorithm, element(0x80, sealed))
    kind = "1.2.840.113549.1.9.16.1.23" if gcm else "1.2.840.113549.1.7.3"
    return sequence(oid(kind), element(0xA0, sequence(integer(version), element(0x31, *infos), content_info, tag)))


def recipient_info(certificate: x509.Certificate, key: bytes, *, oaep: bool) -> bytes:
    """The key of the content, for the owner of a certificate: by RSA (RFC 3370, RFC 3560) or by ECDH (RFC 5753)."""
    from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
    from cryptography.hazmat.primitives.keywrap import aes_key_wrap

    public = certificate.public_key()
    serial, issuer, _ = raw_names(certificate)
    name = sequence(issuer, serial)  # IssuerAndSerialNumber, RFC 5652 section 10.2.4
    if isinstance(public, rsa.RSAPublicKey):
        sha256 = sequence(oid("2.16.840.1.101.3.4.2.1"))
        mgf1 = sequence(oid("1.2.840.113549.1.1.8"), sha256)
        algorithm = sequence(oid("1.2.840.113549.1.1.1"), element(0x05))
        scheme: padding.AsymmetricPadding = padding.PKCS1v15()
        if oaep:
            algorithm = sequence(oid("1.2.840.113549.1.1.7"), sequence(element(0xA0, sha256), element(0xA1, mgf1)))
            scheme = padding.OAEP(padding.MGF1(SHA256()), SHA256(), None)
        return sequence(integer(0), name, algorithm, octets(public.encrypt(key, scheme)))
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ValueError
    ephemeral = ec.generate_private_key(public.curve)
    originator = ephemeral.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    key_wrap = sequence(oid("2.16.840.1.101.3.4.1.45"))
    shared = sequence(key_wrap, element(0xA2, octets((8 * len(key)).to_bytes(4, "big"))))
    wrapping_key = X963KDF(SHA256(), len(key), shared).derive(ephemeral.exchange(ec.ECDH(), public))
    return element(
        0xA1,
        integer(3),
        element(0xA0, b"\xa1" + originator[1:]),  # [1] IMPLICIT in place of SEQUENCE
        sequence(oid("1.3.132.1.11.1"), key_wrap),
        sequence(sequence(name, octets(aes_key_wrap(wrapping_key, key)))),
    )


def element(tag: int, *contents: bytes) -> bytes:
    """Tag, length and content (X.690 section 8.1)."""
    size = sum(map(len, contents))
    long = size.to_bytes((size.bit_length() + 7) // 8, "big") if size >= 0x80 else b""
    return b"".join((bytes([tag, 0x80 + len(long) if long else size]), long, *contents))


sequence, octets = partial(element, 0x30), partial(element, 0x04)


def integer(value: int) -> bytes:
    return element(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def oid(dotted: str) -> bytes:
    """An object identifier (X.690 section 8.19)."""
    first, second, *rest = map(int, dotted.split("."))
    encoded: list[int] = []
    for arc in (40 * first + second, *rest):
        encoded += [arc >> shift & 0x7F | 0x80 for shift in range(28, 0, -7) if arc >> shift] + [arc & 0x7F]
    return element(0x06, bytes(encoded))


# -------------------------------------------------------------------------------------------------- transports


class Stdout:
    """Prints messages."""

    attempts, opened = 0, list[str]()

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt:
        """Raises Error."""
        with system_errors("standard output"):
            write_all(1, message)
        return Receipt(envelope.recipients, {})

    def close(self) -> None:
        pass


class Session(smtplib.SMTP):
    """smtplib's session, with transactions in two round trips (RFC 2920)."""

    sock: Any
    handed_over = False  # a message, to which no answer has come yet

    def getreply(self) -> tuple[int, bytes]:
        code, text = super().getreply()
        if code == -1 and self.handed_over:
            raise smtplib.SMTPServerDisconnected("the answer is not SMTP")
        self.handed_over = False
        return code, text

    def transact(self, sender: str, recipients: Sequence[str], message: bytes, options: str) -> Answers:
        """Who was refused of the recipients of a message; raises as smtplib's sendmail does."""
        commands = [f"MAIL FROM:<{sender}>{options}", *(f"RCPT TO:<{each}>" for each in recipients), "DATA"]
        replies = self.converse(commands)
        answers = dict(zip(recipients, replies[1:], strict=False))
        refused = {recipient: answer for recipient, answer in answers.items() if answer[0] not in (250, 251)}
        begun = len(replies) == len(commands) and replies[-1][0] == 354
        failure: Exception
        if replies[0][0] != 250:
            failure = smtplib.SMTPSenderRefused(*replies[0], sender)
        elif len(refused) == len(answers) or len(replies) < len(commands):
            failure = smtplib.SMTPRecipientsRefused(refused)
        elif not begun:
            failure = smtplib.SMTPDataError(*replies[-1])
        else:
            answer, begun = self.send_content(message), False
            if answer[0] == 250:
                return refused
            failure = smtplib.SMTPDataError(*answer)
        with suppress(smtplib.SMTPException):
            if begun and not all(400 <= code < 600 for code, _ in answers.values()):
                self.close()  # the server may have accepted somebody, and nobody shall get an empty message
            elif begun:  # with nobody to get the message it must be empty, RFC 2920 section 3.1
                self.send(b".\r\n")
                self.getreply()
            self.rset()
        raise failure

    def send_content(self, message: bytes) -> tuple[int, bytes]:
        """The answer to a whole message."""
        if message.find(b"\n.", 0, message.rfind(b".") + 1) >= 0:  # RFC 5321 section 4.5.2; not in base64
            message = message.replace(b"\n.", b"\n..")
        if message.startswith(b"."):
            message = b"." + message
        end = b".\r\n" if message.endswith(CRLF) else b"\r\n.\r\n"
        for start in range(0, len(message), PIECE):
            piece = message[start : start + PIECE]
            self.handed_over = start + PIECE >= len(message)
            self.send(piece + end if self.handed_over else piece)
        self.sock.settimeout(FINAL_TIMEOUT)
        answer = self.getreply()
        self.sock.settimeout(TIMEOUT)
        return answer

    def converse(self, commands: Sequence[str]) -> list[tuple[int, bytes]]:
        """The replies to commands, which go out together where the server takes them so (RFC 2920).

        Commands that have become useless are not sent: there are fewer replies then.
        """
        at_once = COMMANDS_AT_ONCE if self.has_extn("pipelining") else 1
        replies: list[tuple[int, bytes]] = []
        for start in range(0, len(commands), at_once):
            group = commands[start : start + at_once]
            nobody = not any(code in (250, 251) for code, _ in replies[1:])
            if start and (replies[0][0] != 250 or (group == ["DATA"] and nobody)):
                break
            self.send("".join(f"{command}\r\n" for command in group).encode())
            for _ in group:
                replies.append(self.getreply())
                if replies[-1][0] == 421:  # the server closes the connection, RFC 5321 section 3.8
                    self.close()
                    return replies
        return replies


class Smtp:
    """Sends messages to an SMTP server, many over one connection; its answers are told as smtplib prints them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.session: Any = None
        self.used = self.attempts = 0  # transactions, over this connection and over all
        self.opened: list[str] = []  # what to report of new connections
        if settings.smtp_ca_file:
            tls_context(settings.smtp_ca_file)  # Error, before there is a connection

    def open(self) -> list[str]:
        """Connect, and log in where there is a password. Returns what to report of it. Raises Error."""
        settings = self.settings
        self.close()
        with smtp_errors(settings):
            session, security = open_session(settings)
            session.ehlo_or_helo_if_needed()  # once more after STARTTLS
            if settings.smtp_user and settings.smtp_password:
                session.login(settings.smtp_user, settings.smtp_password)
        self.session, self.used = session, 0
        return [
            f"Opened SMTP connection ({security})",
            f"Host: {settings.smtp_host}",
            f"Port: {settings.smtp_port}",
            f'User: "{settings.smtp_user}"',
            f'Password: "{STARS if settings.smtp_password else ""}"',
        ]

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt:
        """Raises Error when no recipient was accepted."""
        if self.settings.smtp_host.lower().endswith(SPARKPOST_HOSTS):
            own = any(field_name(field) == "x-msys-api" for field in split_entity(message)[0])
            message = message if own else NO_TRACKING + message
        if not self.session or self.used >= MESSAGES_PER_CONNECTION:
            self.opened += self.open()
        spelt = {wire_address(recipient): recipient for recipient in envelope.recipients}
        answers = self.transact(wire_address(envelope.sender), list(spelt), message)
        refused = {address: answer for address, answer in answers.items() if answer[0] != TOO_MANY_RECIPIENTS}
        return Receipt(
            accepted=tuple(recipient for address, recipient in spelt.items() if address not in answers),
            refused={spelt[address]: without_secrets(str(refused[address]), self.settings) for address in refused},
            errors=[without_secrets(str(refused), self.settings)] if refused else [],
            temporary=all(400 <= code < 500 for code, _ in refused.values()),
            left=tuple(spelt[address] for address in answers if address not in refused),
        )

    def transact(self, sender: str, recipients: Sequence[str], message: bytes) -> Answers:
        """Who was refused in one transaction. Raises Error.

        It begins anew over a new connection where the server closed the old one before the message was handed over.
        """
        reused = self.used > 0
        self.used += 1
        self.attempts += 1
        try:
            options = self.mail_options(message, [sender, *recipients])
            with smtp_errors(self.settings, self.session):
                answers: Answers = self.session.transact(sender, recipients, message, options)
                return answers
        except Lost as error:
            self.close()
            if not reused or not isinstance(error, Closed):
                raise
        self.open()
        return self.transact(sender, recipients, message)

    def mail_options(self, message: bytes, mailboxes: Iterable[str]) -> str:
        """What MAIL FROM must say of the message (RFC 1870, RFC 6152, RFC 6531).

        Raises Error where the server cannot do it.
        """
        session = self.session
        size = f" SIZE={len(message)}" if session.has_extn("size") else ""
        if message[: message.index(CRLF + CRLF)].isascii() and all(address.isascii() for address in mailboxes):
            return size + (" BODY=8BITMIME" if not message.isascii() and session.has_extn("8bitmime") else "")
        if not session.has_extn("smtputf8"):
            raise Error(f"{self.settings.smtp_host} does not offer SMTPUTF8", "use ASCII addresses or another server")
        return f"{size} SMTPUTF8 BODY=8BITMIME"

    def close(self) -> None:
        if self.session and self.session.sock:
            self.session.sock.settimeout(2)  # by now the messages are accepted or refused
            with suppress(OSError):  # as smtplib's errors are
                self.session.quit()
        self.session = None


def open_session(settings: Settings) -> tuple[Session, str]:
    """A session with the server, and how it is secured. Raises Error, and what smtplib and ssl raise.

    A password crosses no network without verified TLS (RFC 8314 section 3).
    """
    session, host = greet(settings), settings.smtp_host
    if settings.smtp_tls == "off" or not session.has_extn("starttls"):
        if settings.smtp_tls == "verify":
            raise Barred(f"{host} does not offer STARTTLS", "SMTP_TLS=verify demands it; is the port right?")
        if exposes_password(session, settings):
            cure = "use a port that offers STARTTLS, and not SMTP_TLS=off"
            raise Barred(f"{host}: a password is not sent over a plain connection", cure)
        return session, "plain"
    try:
        session.starttls(context=tls_context(settings.smtp_ca_file))
        return session, "STARTTLS"
    except ssl.SSLCertVerificationError as error:
        failure = f"{host}: its certificate cannot be verified: {error.verify_message}"
    session.close()  # a failed handshake ends the connection
    session = greet(settings)
    if settings.smtp_tls == "verify" or settings.smtp_ca_file or exposes_password(session, settings):
        raise Barred(failure, "name the CA that issued it in SMTP_CA_FILE")
    session.starttls(context=tls_context("", verify=False))
    return session, "STARTTLS, certificate not verified"


def exposes_password(session: Session, settings: Settings) -> bool:
    """Whether a password would go to another machine."""
    return bool(settings.smtp_user and settings.smtp_password) and not is_loopback(session.sock.getpeername()[0])


@cache
def tls_context(ca_file: str, *, verify: bool = True) -> ssl.SSLContext:
    """Raises Error where the CA certificates cannot be read."""
    with system_errors(f"SMTP_CA_FILE {ca_file}", "it must hold CA certificates in PEM form"):
        context = ssl.create_default_context(cafile=ca_file or None)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def greet(settings: Settings) -> Session:
    """Connect and say EHLO."""
    name = socket.gethostname()
    if "." not in name or not name.isascii():
        name = "[127.0.0.1]"  # as smtplib says, but without asking DNS for the full name
    session = Session(settings.smtp_host, settings.smtp_port, local_hostname=name, timeout=TIMEOUT)
    session.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the final dot waits for no acknowledgement
    session.ehlo_or_helo_if_needed()
    return session


@contextmanager
def smtp_errors(settings: Settings, session: Session | None = None) -> Iterator[None]:
    """Raise what smtplib raises as an Error: answers of the server unchanged, 4xx and lost connections as temporary."""
    where = f"{settings.smtp_host} port {settings.smtp_port}"
    cure = "is the server running, are SMTP_HOST and SMTP_PORT right?"
    final, temporary, gone = (Error, TemporaryError, Closed) if session else (Barred, Unreachable, Unreachable)
    try:
        yield
    except (OSError, ValueError) as error:
        # smtplib's errors are OSErrors; its base64 decoder and the idna codec raise ValueError
        reason = without_secrets(f"{where}: {getattr(error, 'strerror', None) or error}", settings)
        if session and session.handed_over:
            raise Lost(f"{reason}; the message may have been sent", "look before sending it again") from None
        replies: Answers = {}
        if isinstance(error, smtplib.SMTPRecipientsRefused):
            replies = error.recipients
            codes = [code for code, _ in replies.values()]
        elif isinstance(error, smtplib.SMTPResponseException):
            codes = [error.smtp_code]
        elif isinstance(error, smtplib.SMTPException) and not isinstance(error, smtplib.SMTPServerDisconnected):
            raise final(reason, "this port takes no such login: use another, or leave SMTP_USER unset") from None
        else:
            raise (gone if isinstance(error, OSError) else final)(reason, cure) from None
        kind = temporary if all(400 <= code < 500 for code in codes) else final
        told = (gone if 421 in codes else kind)(without_secrets(str(error), settings), prefix="")
        told.replies = {each: without_secrets(str(answer), settings) for each, answer in replies.items()}
        raise told from None


def without_secrets(answer: str, settings: Settings) -> str:
    """Hide what a server might repeat of the login."""
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

        self.settings, self.own_return_path, self.attempts = settings, own_return_path, 0
        self.opened = ["Opened API connection", f"Host: {settings.api_host}", f'API key: "{STARS}"']
        secure = settings.api_host.startswith("https:")  # else it is on loopback, and the key must pass no proxy
        self.handler = kept_connection(secure=secure)
        self.opener = request.OpenerDirector()  # follows no redirection, lest the key go along; no HTTPError
        self.opener.add_handler(request.ProxyHandler(None if secure else {}))
        self.opener.add_handler(self.handler)

    def deliver(self, message: bytes, envelope: Envelope) -> Receipt:
        """Raises Error when the API refuses the message as a whole."""
        import json

        if len(message) > LARGEST_CONTENT:
            raise Error(f"the API takes no message over {LARGEST_CONTENT} bytes", "use --send_smtp")
        try:
            content = message.decode()
        except UnicodeDecodeError:
            raise Error("the API takes text in UTF-8 only", "sign or encrypt it, or use --send_smtp") from None
        options = dict.fromkeys(("open_tracking", "click_tracking", "perform_substitutions"), False)
        transmission: dict[str, object] = {
            "options": options | {"transactional": True},
            "recipients": [{"address": {"email": wire_address(recipient)}} for recipient in envelope.recipients],
            "content": {"email_rfc822": content},
        }
        if self.own_return_path:
            transmission["return_path"] = wire_address(envelope.sender)
        status, reply = self.post(json.dumps(transmission).encode())
        answer: dict[str, object] = {}
        with suppress(ValueError, TypeError, RecursionError):  # of what is no JSON object
            answer = {**json.loads(reply)}
        return self.read_answer(status, answer, envelope.recipients)

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and reply of the API; the reply is empty where it broke off. Raises Error."""
        from http.client import HTTPException, InvalidURL
        from urllib.error import URLError
        from urllib.request import Request

        host = self.settings.api_host
        headers = {"Authorization": self.settings.api_key, "Content-Type": "application/json"}
        headers |= {"Content-Length": str(len(body)), "User-Agent": f"sparkpostSMIME/{VERSION}"}
        request = Request(f"{host}/api/v1/transmissions", io.BytesIO(body), headers)  # a file is sent in pieces
        try:
            response = self.opener.open(request, timeout=TIMEOUT)
        except URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                reason = f"{host}: its certificate cannot be verified: {error.reason.verify_message}"
                raise Barred(reason, "name the CA that issued it in SSL_CERT_FILE") from None
            if self.handler.connection.reused:  # closed before all of the request was there
                return self.post(body)
            kind = Closed if self.handler.connection.reached else Unreachable
            reason = getattr(error.reason, "strerror", None) or str(error.reason)
            raise kind(f"{host}: {reason}", "is SPARKPOST_HOST right, and the network up?") from None
        except (InvalidURL, ValueError):
            raise Error(f"{host}: no request to this address is possible", "is HTTPS_PROXY right?") from None
        except (HTTPException, OSError) as error:
            reason = without_secrets(f"{host}: {error}; the message may have been sent", self.settings)
            raise Lost(reason, "look before sending it again") from None
        finally:
            self.attempts += self.handler.connection.reached
        reply = b""
        with response, suppress(HTTPException, OSError, ValueError):  # as of a chunk of -5 bytes
            reply = response.read(LARGEST_REPLY + 1)
        if not 0 < len(reply) <= LARGEST_REPLY:
            self.handler.connection.kept = None  # what is left of this reply must not answer the next request
        return response.status, reply

    def read_answer(self, status: int, answer: Mapping[str, object], recipients: tuple[str, ...]) -> Receipt:
        """What the API says of a message for these recipients. Raises Error."""
        results = answer.get("results")
        results = results if isinstance(results, dict) else {}
        answers = api_errors(answer.get("errors")) + api_errors(results.get("rcpt_to_errors"))
        answers = [without_secrets(line, self.settings) for line in answers]
        accepted = results.get("total_accepted_recipients")
        if status == 200 and type(accepted) is int and 0 <= accepted <= len(recipients):
            identifier = str(results.get("id", ""))[:100]
            if accepted == len(recipients):
                return Receipt(recipients, {}, answers, identifier=identifier)
            lost = [f"{len(recipients) - accepted} of {len(recipients)} recipients were not accepted"]
            about = {word.strip("'.[]"): line for line in answers for word in re.split(r'[\s<>,;:"()]+', line.lower())}
            refused = {each: about[same_address(each)] for each in recipients if same_address(each) in about}
            if len(refused) != len(recipients) - accepted:  # nobody knows who has the message
                refused = dict.fromkeys(recipients, (answers or lost)[0])
            has = tuple(each for each in recipients if each not in refused)
            return Receipt(has, refused, answers or lost, False, unknown=accepted - len(has), identifier=identifier)
        told = "; ".join(answers) or "the reply is cut short, too long, or not from this API"
        where = f"{self.settings.api_host}: HTTP status {status}: {told}"
        if 200 <= status < 300 or status == 504:
            raise TemporaryError(f"{where}; the message may have been sent", "look before sending it again")
        if status in (408, 420, 429) or status >= 500:
            raise TemporaryError(where, "try again later")
        cure = "are SPARKPOST_API_KEY and SPARKPOST_HOST right?" if status in (401, 403, 404) else ""
        raise (Barred if status == 401 else Error)(where, cure)  # 403 may be about this message

    def close(self) -> None:
        pass


def kept_connection(*, secure: bool) -> Any:
    """urllib's handler of http and https, over one connection for 15 minutes or until the server closes it."""
    from http import client
    from urllib import request

    class Connection(client.HTTPConnection):
        sock: Any
        kept: Any = None  # the socket between two requests, when urllib would close it
        reached = reused = False  # for the request under way
        opened = 0.0

        def connect(self) -> None:
            super().connect()
            self.reached, self.opened = True, monotonic()

        def request(self, method: str, url: str, body: Any = None, headers: Any = None, **named: Any) -> None:
            young = monotonic() < self.opened + CONNECTION_LIFE
            self.reused = self.reached = bool(self.kept) and young and not ready(self.kept.fileno(), POLLIN, 0)
            self.sock, self.kept = self.kept if self.reused else None, None
            super().request(method, url, body, headers | {"Connection": "keep-alive"}, **named)

        def getresponse(self) -> Any:
            self.sock.settimeout(FINAL_TIMEOUT)
            response = super().getresponse()
            if self.sock:
                self.sock.settimeout(TIMEOUT)
            self.kept, self.sock = self.sock, None
            return response

    class SecureConnection(Connection, client.HTTPSConnection):  # https is verified
        pass

    class Handler(request.AbstractHTTPHandler):
        http_request = https_request = request.AbstractHTTPHandler.do_request_
        connection: Any = Connection("")  # to no host, until one is known

        def connect(self, host: str, **named: Any) -> Any:
            if not self.connection.host:
                self.connection = (SecureConnection if secure else Connection)(host, blocksize=PIECE, **named)
            return self.connection

        def http_open(self, request: request.Request) -> Any:
            return self.do_open(self.connect, request)

        https_open = http_open

    return Handler()


def api_errors(errors: object) -> list[str]:
    """Each error as `code, message, description`, as far as it has them."""
    found = []
    for error in errors if isinstance(errors, list) else [errors]:
        parts = [error.get(key) for key in ("code", "message", "description")] if isinstance(error, dict) else [error]
        found.append(", ".join(str(part) for part in parts if part))
    return [line[:1000] for line in found if line]


# ------------------------------------------------------------------------------------------------------- outbox


@contextmanager
def locked(path: str, sent: str) -> Iterator[list[int]]:
    """Lock a message file against other runs, and yield its identity.

    Raises Elsewhere where another run has it or has moved it to the folder `sent`, and Error.
    """
    from fcntl import LOCK_EX, LOCK_NB, flock

    with system_errors(path):
        try:  # NFS locks only a file that is open for writing
            file = open(path, "r+b" if os.access(path, os.W_OK) else "rb")  # noqa: SIM115
            flock(file, LOCK_EX | LOCK_NB)
            which, now = identity(file.fileno()), identity(path)
        except BlockingIOError:
            raise Elsewhere from None
        except FileNotFoundError:
            if os.path.lexists(os.path.join(sent, os.path.basename(path))):
                raise Elsewhere from None
            raise
    with file:
        if now[:1] != which[:1]:
            raise Elsewhere
        yield which


def read_note(path: str, which: list[int]) -> list[str]:
    """Who has this message of an outbox already, if a note of this very file says so. Raises Error."""
    import json

    note = f"{path}.accepted"
    try:
        with system_errors(note), suppress(FileNotFoundError), open(note) as file:
            kept = json.load(file)
            accepted = kept["accepted"] if kept["file"] == which else []
            if accepted is not None:
                return list(accepted)
            cure = "see to the others and move the message away, or delete this note to send it to everybody"
            raise Error(f"{note}: the API has accepted the message for some recipients, and did not say which", cure)
    except (ValueError, LookupError, TypeError):
        raise Error(f"{note} cannot be read", "delete it to send the message to everybody") from None
    return []


def write_note(path: str, which: list[int], accepted: list[str] | None) -> list[str]:
    """Keep who has this message, None where that is unknown, through crashes and power cuts; tell what went wrong."""
    import json

    new = f"{path}.noting"  # shorter than the note's own name, which was tried before anything was sent
    try:
        if identity(path) != which:  # the note of another message, which has come in its place, stays
            return []
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"file": which, "accepted": accepted}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, f"{path}.accepted")
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return []
    except (OSError, KeyboardInterrupt) as error:
        with suppress(OSError):
            os.unlink(new)
        if isinstance(error, KeyboardInterrupt):
            raise
        return [f"{PROGRAM}: {path}: who has it cannot be noted: {error.strerror} - the next run may send it again"]


def identity(file: str | int, *, follow: bool = True) -> list[int]:
    """What tells this file, or symbolic link, from another that takes its name later; empty where there is none."""
    with suppress(FileNotFoundError):
        status = os.stat(file, follow_symlinks=follow)
        return [status.st_ino, status.st_mtime_ns]
    return []


def lock(folder: int) -> None:
    """Lock a folder, unless it is on NFS, which locks none. Raises BlockingIOError after two seconds."""
    from fcntl import LOCK_EX, LOCK_NB, flock

    for _ in range(200):
        try:
            return flock(folder, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            sleep(0.01)
        except OSError:
            return None
    raise BlockingIOError(EWOULDBLOCK, "another program holds a lock on it, perhaps the one that started this")


def move_to(sent: str, path: str, which: list[int]) -> None:
    """Put a message that everybody has into the folder `sent`, under a name that is free there. Raises OSError.

    Another message that has come in its place meanwhile stays for the next run.
    """
    entry = identity(path, follow=False)
    if identity(path) != which:
        return
    stem, suffix = os.path.splitext(os.path.join(sent, os.path.basename(path)))
    targets = (f"{stem}{f'.{number}' if number else ''}{suffix}" for number in count())
    folder = os.open(sent, os.O_RDONLY)
    try:
        lock(folder)  # lest two messages of one name find it free
        target = next(target for target in targets if not os.path.lexists(target))
        os.rename(path, target)
        if identity(target, follow=False) != entry:  # another, which came after the look above
            os.rename(target, path)
    finally:
        os.close(folder)
    if identity(path, follow=False):  # another has come, and the note may be its own
        return
    for ending in ("accepted", "noting"):  # the latter is left where a process was killed
        with suppress(FileNotFoundError):
            os.unlink(f"{path}.{ending}")


def list_files(paths: Iterable[str], *, outbox: bool) -> list[str]:
    """The message files; a folder stands for its *.eml in name order, which only an outbox may lack. Raises Error."""
    files = []
    for path in paths:
        found = [path]
        if os.path.isdir(path):
            with system_errors(path):
                names = sorted(name for name in os.listdir(path) if name.endswith(".eml") and name[0] != ".")
            found = [os.path.join(path, name) for name in names]
        if not found and not outbox:
            raise Error(f"{path}: no *.eml file is in this directory", "name a message, or the directory of some")
        files += found
    return files


def check_sent(sent: str, files: Iterable[str]) -> None:
    """Try whether messages can be moved to this folder. Raises Error."""
    for folder in {os.path.dirname(path) or "." for path in files}:
        probe = os.path.join(folder, f".{PROGRAM}.{os.urandom(8).hex()}")
        cure = "both must exist on one file system, and you must be allowed to read and write in both"
        with system_errors(f"{folder}: messages cannot be moved to {sent}", cure):
            if os.path.samefile(folder, sent):
                raise Error(f"{sent}: the messages are in this very folder", "name another one with --sent")
            os.close(os.open(sent, os.O_RDONLY))
            os.close(os.open(probe, os.O_CREAT, 0o600))
            moved = os.path.join(sent, os.path.basename(probe))
            try:
                os.rename(probe, moved)
                probe = moved
            finally:
                os.unlink(probe)


# ----------------------------------------------------------------------------------------------------- program


def prepare(
    path: str, accepted: Sequence[str], options: Options, keyring: Keyring, record: dict[str, object]
) -> Prepared:
    """Read a message and make it ready for those who have not accepted it yet. Raises Error.

    Message-ID and sender go into the `record` as soon as they are known.
    """
    raw = read_file(path)
    fields, blank, body = split_entity(raw)
    line_end = CRLF if raw[: raw.find(b"\n") + 1].endswith(CRLF) else b"\n"
    del raw
    if not blank and not options.recipient:
        refuse_stray_recipients(body)
    record["message_id"] = next(iter(field_texts(fields, "message-id")), None)
    envelope = read_envelope(fields, options.return_path, options.recipient)
    record["sender"] = envelope.sender
    people = [f"{name}: {text}" for name in ("From", "To", "Cc", "Bcc") for text in field_texts(fields, name.lower())]
    served = audience(envelope, accepted, options, keyring.remarks)
    from_address = author(fields, "from", "sender")
    everybody = [*served.recipients, *served.hidden, *options.archive] if options.encrypt else []
    signer, certificates = keyring.load(from_address if options.sign else "", everybody)
    header = outer_fields(fields, options, domain=from_address.rpartition("@")[2])
    record["message_id"] = field_texts(header, "message-id")[0]
    clear = options.sign and not options.opaque
    entity = make_entity(fields, body, clear=clear) if options.protects else CRLF + to_crlf(body)
    del body
    if options.protect_headers:
        entity, header = protect_headers(entity, header, hide=options.encrypt)
        if clear and not options.encrypt and not is_fit(entity, clear=True):
            raise Error("a header field is unfit for a clear signature", "use --opaque")
    strong = options.rsa_padding == "pss_oaep"
    if signer:
        keyring.remarks += date_remarks(header)
        entity = sign(entity, signer, opaque=options.opaque, pss=strong)
    head = joined(header)
    copies = []
    for copy in plan_copies(served, certificates, options, keyring.remarks):
        if options.encrypt:
            readers = [certificates[address] for address in (*copy.recipients, *options.archive)]
            content = encrypt(entity, readers, gcm=options.cipher == "aes256-gcm", oaep=strong, before=head)
        else:
            content = head + entity
        copies.append((content if options.sends or line_end == CRLF else content.replace(CRLF, line_end), copy))
    return Prepared(copies, people)


def refuse_stray_recipients(body: bytes) -> None:
    """Where a line that is no field has ended the header, recipients named below it would get nothing. Raises Error."""
    rest = re.split(rb"\n\r?\n", body, maxsplit=1)[0]
    if re.search(rb"(?im)^(?:resent-)?(?:to|cc|bcc)[^a-z:\n-]*:", rest):
        line = to_text(rest.partition(b"\n")[0])
        raise Error(f"the header ends at a line that is no field, {line[:60]!r}, above recipients", "mend that line")


def audience(envelope: Envelope, accepted: Sequence[str], options: Options, remarks: list[str]) -> Envelope:
    """Who is to get the message in this run. Raises Error where it could be printed for nobody.

    An encrypted message is printed without its Bcc recipients, whom it would give away, unless --recipient names them.
    """
    shown = tuple(each for each in envelope.recipients if each not in accepted)
    hidden = tuple(each for each in envelope.hidden if each not in accepted)
    if options.encrypt and options.sends:
        return Envelope(envelope.sender, shown, hidden)
    if not options.encrypt or options.recipient:
        return Envelope(envelope.sender, shown + hidden)
    if not shown:
        raise Error("the message has Bcc recipients only, and their copies are not printed", "use --send_smtp")
    if hidden:
        remarks.append(f"the printed copy leaves out the Bcc recipients {', '.join(hidden)}")
    return Envelope(envelope.sender, shown)


def plan_copies(
    envelope: Envelope, certificates: Mapping[str, x509.Certificate], options: Options, remarks: list[str]
) -> list[Envelope]:
    """One copy for all; but encrypted and sent, one for RSA and one for elliptic curve keys, and one for each Bcc.

    A copy shared with others would give a Bcc recipient away, and older NSS opens none that serves an elliptic curve
    key too.
    """
    if not options.encrypt:
        return [envelope]
    groups = [envelope.recipients]
    if options.sends:
        kinds = {each: is_rsa(certificates[each]) for each in envelope.recipients}
        groups = [tuple(each for each in kinds if kinds[each] is kind) for kind in (True, False)]
        groups += [(recipient,) for recipient in envelope.hidden]
    groups = [group for group in groups if group]
    if any(len({is_rsa(certificates[each]) for each in (*group, *options.archive)}) > 1 for group in groups):
        remarks.append("a message serves RSA and elliptic curve keys together, and some readers cannot open it")
    return [Envelope(envelope.sender, group) for group in groups]


def date_remarks(header: Iterable[bytes]) -> list[str]:
    """Thunderbird calls a signature invalid that was made more than an hour from the message's Date."""
    text = field_texts(header, "date")[0]
    try:
        date = parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        distance = abs((datetime.now(timezone.utc) - date).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return [f"the Date {text[:80]!r} cannot be read - --date_now replaces it"]
    late = f"the Date {text} is over one hour from now: Thunderbird will call the signature invalid - add --date_now"
    return [late] if distance > 3600 else []


def failure(path: str, error: Error) -> Outcome:
    return Outcome(path, error.exit_code, {"error": error.text}, errors=[str(error)])


class Worker:
    """Takes messages all the way, one after the other, over connections of its own."""

    def __init__(self, options: Options, settings: Settings) -> None:
        """Raises Error where no message could be prepared."""
        self.options, self.keyring = options, Keyring(options, settings)
        self.transport: Stdout | Smtp | Api = Stdout()
        if options.send_smtp:
            self.transport = Smtp(settings)
        elif options.send_api:
            self.transport = Api(settings, own_return_path=bool(options.return_path))
        self.shut_out = 0  # messages in a row that found no way into the server
        self.hopeless = ""  # why it is useless, or would do harm, to go on

    def process(self, path: str) -> Outcome:
        """Deliver one message file, and move it where it came from an outbox."""
        if self.hopeless:
            reason = f"{self.hopeless}: the rest is not tried"
            return Outcome(path, EXIT_TEMPORARY, {"error": reason}, [reason])
        sent, record = self.options.sent, dict[str, object]()
        try:
            with locked(path, sent) if sent else nullcontext(list[int]()) as which:
                outcome = self.deliver(path, which, record)
        except Elsewhere:
            return Outcome(path, None, {})
        except Error as error:
            outcome = failure(path, error)
        except MemoryError:
            outcome = failure(path, Error("there is not enough memory for this message"))
        if self.shut_out >= ENOUGH_FAILURES:
            self.hopeless = f"{ENOUGH_FAILURES} messages in a row found no way into the server"
        remarks, self.keyring.remarks = self.keyring.remarks, []
        return outcome._replace(remarks=remarks, record={**record, **outcome.record})

    def deliver(self, path: str, which: list[int], record: dict[str, object]) -> Outcome:
        """Deliver the copies of a message; one failure keeps no other back. Raises Error before anything was sent.

        In an outbox, keep who has it, or move it once everybody has.
        """
        sent = self.options.sent
        had = read_note(path, which) if sent else []
        message = prepare(path, had, self.options, self.keyring, record)
        if sent and identity(path) != which:
            raise TemporaryError(f"{path}: another message has come in its place", "the next run sends that")
        total, unmoved, unnoted, started = Receipt((), {}), list[str](), list[str](), perf_counter()
        for content, envelope in message.copies:
            while envelope.recipients:
                receipt = self.hand_over(content, envelope, gone=total.lost)
                total, envelope = total.plus(receipt), envelope._replace(recipients=receipt.left)
                if sent and 0 < total.reached < message.wanted:
                    unnoted = write_note(path, which, None if total.unknown else [*had, *total.accepted])
        seconds = perf_counter() - started
        if sent and total.reached == message.wanted:
            try:
                move_to(sent, path, which)
                unnoted = []  # a note is of no use now
            except OSError as error:
                unmoved = [f"{PROGRAM}: {path}: sent, but not moved to {sent}: {error.strerror}"]
                unnoted = write_note(path, which, [*had, *total.accepted])
        if unnoted:  # better send no more
            self.hopeless = "the outbox cannot be written"
        return self.conclude(path, message, total, [*unmoved, *unnoted], seconds)

    def hand_over(self, content: bytes, envelope: Envelope, *, gone: bool) -> Receipt:
        """Deliver one copy, unless the server is gone."""
        if gone:
            return Receipt((), dict.fromkeys(envelope.recipients, "not sent"), lost=True)
        try:
            receipt = self.transport.deliver(content, envelope)
        except Error as error:
            self.shut_out = self.shut_out + 1 if isinstance(error, Unreachable) else 0
            reasons = {each: error.replies.get(wire_address(each), error.text) for each in envelope.recipients}
            temporary, lost = error.exit_code == EXIT_TEMPORARY, isinstance(error, Lost)
            return Receipt((), reasons, [str(error)], temporary, lost)
        except MemoryError:
            self.transport.close()  # lest the next message go on where this one broke off
            text = "there is not enough memory; the message may have been sent"
            return Receipt((), dict.fromkeys(envelope.recipients, text), [f"{PROGRAM}: {text}"], False, lost=True)
        self.shut_out = 0
        return receipt

    def conclude(self, path: str, message: Prepared, total: Receipt, troubles: list[str], seconds: float) -> Outcome:
        """What to tell of a message: `total` became of its copies, and there were these troubles with the outbox."""
        attempts, self.transport.attempts = self.transport.attempts, 0
        lines = list[str]()
        if attempts:
            lines, self.transport.opened = [*self.transport.opened, f"Sending: {path}", *message.people], []
        errors = [*total.errors, *troubles]
        missed = [each for each in total.refused if not any(f"{each!r}: (" in line for line in total.errors)]
        if total.reached and missed and not total.unknown:
            doubt = "perhaps " if total.lost else ""
            errors.append(f"{PROGRAM}: {doubt}not sent to {', '.join(missed)}")
        everybody = total.reached == message.wanted
        if lines and total.reached:
            some = "" if everybody else f" for {total.reached} of {message.wanted} recipients"
            lines.append(f"OK{some} - in {seconds:.3f} seconds")
        if everybody:
            code = EXIT_TEMPORARY if troubles else EXIT_OK
        else:  # to send it again is good where nobody gets it twice
            again = total.temporary and not troubles and (self.options.sent or not total.reached)
            code = EXIT_TEMPORARY if again else EXIT_FAILED
        record = {
            "accepted": total.accepted,
            "refused": total.refused,
            "error": "; ".join(errors) or None,
            "id": total.identifier or None,
            "seconds": round(seconds, 3),
            "attempts": attempts,
        }
        return Outcome(path, code, record, lines=lines, errors=errors)


def outcomes(worker: Worker, files: Sequence[str], halted: Callable[[], bool]) -> Iterator[Outcome]:
    """What becomes of the message files, one after the other; until halted."""
    jobs = min(worker.options.jobs, len(files)) if worker.options.sends else 1
    taken = 0
    if jobs > 1:
        taken = yield from share_out(worker, files, jobs, halted)
    for path in files[taken:]:
        if halted():
            break
        yield worker.process(path)
    with suppress(KeyboardInterrupt):  # all is told
        worker.transport.close()


def share_out(
    worker: Worker, files: Sequence[str], jobs: int, halted: Callable[[], bool]
) -> Generator[Outcome, None, int]:
    """What becomes of the files, shared among so many processes; each takes the next when it has done one.

    Processes, because the interpreter's lock would let threads wait for each other. Returns how many were taken.
    """
    import json

    processes = dict[int, int]()  # each under the pipe through which it reports
    try:
        numbers, opening = start_workers(worker, files, jobs, halted, processes)
        waiting, unread, untold = poll(), dict.fromkeys(processes, b""), set(range(len(files)))
        for pipe in processes:
            waiting.register(pipe, POLLIN)
        os.write(opening, bytes(jobs))
        while unread:
            for pipe, _ in waiting.poll():
                data = os.read(pipe, PIECE)
                *lines, unread[pipe] = (unread[pipe] + data).split(b"\n")
                for line in lines:
                    number, outcome, worker.hopeless = json.loads(line)
                    untold.remove(number)
                    yield Outcome(*outcome)
                if not data:  # the process has ended
                    waiting.unregister(pipe)
                    del unread[pipe]
            sleep(0.005)  # what ends meanwhile is told in one go, and the processors are the workers'
        worker.hopeless = worker.hopeless or "no process is left"
        taken = len(files) - len(os.read(numbers, NUMBER * len(files))) // NUMBER
        for number in sorted(untold.intersection(range(taken))):
            yield failure(files[number], TemporaryError("its process was killed; the message may have been sent"))
        return taken
    finally:
        for process in processes.values():  # has ended, unless this is an interrupt or an Error
            os.kill(process, SIGKILL)
            os.waitpid(process, 0)


def start_workers(
    worker: Worker, files: Sequence[str], jobs: int, halted: Callable[[], bool], processes: dict[int, int]
) -> tuple[int, int]:
    """Add so many `processes`; return the open file from which they read the numbers of their message files.

    They share its offset, which every read moves on, so each number is taken once: POSIX says so of regular files, and
    Linux keeps to it for those that open() opened. Returned too is the pipe from which each waits for a byte before it
    begins. Raises Error.
    """
    from tempfile import TemporaryFile

    cure = "make room for it, or name another folder in TMPDIR"
    with system_errors("a temporary file", cure), TemporaryFile(buffering=0) as file:
        write_all(file.fileno(), b"".join(number.to_bytes(NUMBER, "big") for number in range(len(files))))
        file.seek(0)
        numbers = os.dup(file.fileno())
    signal(SIGCHLD, SIG_DFL)  # where it is ignored, as after trap '' CHLD in bash, nobody could wait for them
    with system_errors(f"--jobs {worker.options.jobs}", "name fewer"):
        gate, opening = os.pipe()
        for _ in range(jobs):
            pipe, end = os.pipe()
            process = os.fork()
            if not process:
                try:
                    for others in (*processes, pipe, opening):
                        os.close(others)
                    serve(worker, files, halted, numbers, gate, end)
                except Exception:
                    sys.excepthook(*sys.exc_info())
                finally:
                    os._exit(0)
            processes[pipe] = process
            os.close(end)
    return numbers, opening


def serve(worker: Worker, files: Sequence[str], halted: Callable[[], bool], numbers: int, gate: int, end: int) -> None:
    """Work on the files whose numbers are read, until none is left, or it is no use, or nobody is left to report to."""
    import json

    for signal_number in (SIGINT, SIGTERM):
        signal(signal_number, SIG_IGN)  # the process that shares out sees to the end
    begin = os.read(gate, 1)  # nothing, where that process has ended
    with suppress(BrokenPipeError):
        while begin and not worker.hopeless and not halted() and (taken := os.read(numbers, NUMBER)):
            number = int.from_bytes(taken, "big")
            outcome = worker.process(files[number])
            write_all(end, json.dumps([number, outcome, worker.hopeless]).encode() + b"\n")
    worker.transport.close()


def run(options: Options, settings: Settings) -> int:
    """Send or print all messages. Returns the exit code; raises Error where none can be sent."""
    files = list_files(options.files, outbox=bool(options.sent))
    many = len(files) != 1 or bool(options.sent)
    worker, report = Worker(options, settings), Report(options.report) if options.report else None
    halted = heed_signals(2 if many else 1)
    if options.sent:
        check_sent(options.sent, files)
    started, counts, told = perf_counter(), dict.fromkeys((EXIT_OK, EXIT_FAILED, EXIT_TEMPORARY, None), 0), set[str]()
    terminal = many and not options.quiet and os.isatty(2)
    for outcome in outcomes(worker, files, halted):
        counts[outcome.code] += 1
        if terminal:
            say("", descriptor=2, end="\r\x1b[K")
        tell(outcome, told, many=many, quiet=options.quiet)
        if report and outcome.code is not None:
            report.add(outcome)
        if terminal:
            say(progress(counts, len(files), perf_counter() - started), descriptor=2, end="")
    if terminal:
        say("", descriptor=2, end="\r\x1b[K")
    counts[EXIT_TEMPORARY] += len(files) - sum(counts.values())
    if many and options.sends and (not options.quiet or counts[EXIT_FAILED] or counts[EXIT_TEMPORARY]):
        say(summary(counts, perf_counter() - started))
    if counts[EXIT_FAILED] or (report and report.broken):
        return EXIT_FAILED
    return EXIT_TEMPORARY if counts[EXIT_TEMPORARY] else EXIT_OK


def heed_signals(most: int) -> Callable[[], bool]:
    """Count SIGINT and SIGTERM, and return what tells whether one has come; the last of so many interrupts at once.

    A pipe keeps it, so that processes forked from this one are told too, even while this one waits to write.
    """
    signals, process = 0, os.getpid()
    heard, told = os.pipe()

    def halt(*_: object) -> None:
        nonlocal signals
        if os.getpid() != process:  # a worker, which is about to ignore them
            return
        signals += 1
        os.write(told, b"!")
        if signals == most:  # no later one disturbs the end that this begins
            raise KeyboardInterrupt

    for number in (SIGINT, SIGTERM):
        if getsignal(number) != SIG_IGN:  # as nohup has it
            signal(number, halt)
    return lambda: ready(heard, POLLIN, 0)


def tell(outcome: Outcome, told: set[str], *, many: bool, quiet: bool) -> None:
    """Write what became of a message; the file's name too where it is one of many, and no warning twice."""
    for remark in outcome.remarks:
        if remark not in told:
            complain(f"{PROGRAM}: warning: {f'{outcome.file}: ' if many else ''}{remark}")
            told.add(remark)
    if outcome.lines and not quiet:
        say(*outcome.lines)
    for line in outcome.errors:
        what = line.removeprefix(f"{PROGRAM}: ").removeprefix(f"{outcome.file}: ")
        complain(f"{PROGRAM}: {outcome.file}: {what}" if many else line)


def progress(counts: Mapping[int | None, int], total: int, seconds: float) -> str:
    done, failed = sum(counts.values()), counts[EXIT_FAILED] + counts[EXIT_TEMPORARY]
    left = (total - done) * seconds / done
    return f"{done} of {total} done, {failed} failed, {done / seconds:.0f} per second, {left:.0f} s left"


def summary(counts: Mapping[int | None, int], seconds: float) -> str:
    sent, total = counts[EXIT_OK], counts[EXIT_OK] + counts[EXIT_FAILED] + counts[EXIT_TEMPORARY]
    names = {EXIT_FAILED: "refused", EXIT_TEMPORARY: "to try again", None: "under way elsewhere"}
    others = "".join(f", {counts[code]} {name}" for code, name in names.items() if counts[code])
    return f"Sent {sent} of {total} messages in {seconds:.1f} seconds ({sent / seconds:.0f} per second){others}"


class Report:
    """A file to which a line of JSON is appended for each message."""

    def __init__(self, path: str) -> None:
        """Raises Error where it cannot be opened."""
        self.path, self.broken = path, False
        with system_errors(path, "--report needs a file it can write"):
            self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, outcome: Outcome) -> None:
        """Complain the first time that it cannot be written; the messages go on."""
        import json

        line = {"file": outcome.file} | NOTHING_SENT | dict(outcome.record)
        try:
            write_all(self.descriptor, json.dumps(line).encode() + b"\n")
        except OSError as error:
            if not self.broken:
                complain(f"{PROGRAM}: {self.path}: {error.strerror} - the report is not complete")
            self.broken = True


def say(*lines: str, descriptor: int = 1, end: str = "\n") -> None:
    """Write lines to standard output or error, whatever characters they hold; it is no failure if nobody reads them."""
    shown = [
        line if line.isprintable() else "".join(c if c.isprintable() or c == "\t" else "?" for c in line)
        for line in lines
    ]
    with suppress(OSError):
        write_all(descriptor, ("\n".join(shown) + end).encode(sys.getfilesystemencoding(), "backslashreplace"))


def write_all(descriptor: int, data: bytes) -> None:
    """Write without a buffer, which would be flushed a second time after a signal. Raises OSError."""
    rest = memoryview(data)
    while rest:  # a full disk may take a part
        ready(descriptor, POLLOUT)  # waits, should writing not wait (O_NONBLOCK)
        rest = rest[os.write(descriptor, rest) :]


def ready(descriptor: int, event: int, patience: int | None = None) -> bool:
    """Whether it can be read or written, after so many milliseconds at most; select takes no descriptor over 1023."""
    waiting = poll()
    waiting.register(descriptor, event)
    return bool(waiting.poll(patience))


def complain(line: str) -> None:
    """Write a line to standard error."""
    say(line, descriptor=2)


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
        complain(MISSING.format(error.name))
        return EXIT_FAILED
    except KeyboardInterrupt:
        complain(f"{PROGRAM}: interrupted{'; a message under way may have been sent' if options.sends else ''}")
        return EXIT_TEMPORARY


if __name__ == "__main__":
    os._exit(main())  # at once, as above: all that was written is flushed
