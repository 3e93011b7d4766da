"""What other programs make of our messages: openssl, gpgsm and NSS, each with keys of its own store."""

from __future__ import annotations

import base64
import email
import re
import subprocess
from pathlib import Path

from pki import Identity, certificate_pem, key_pem


def command(*words: str | Path, data: bytes = b"") -> bytes:
    """What a program prints; raises AssertionError, with what it says, when it fails."""
    done = subprocess.run(words, input=data, capture_output=True, timeout=60)
    if done.returncode:
        raise AssertionError(f"{words[0]} {words[1]}: exit {done.returncode}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def body_of(entity: bytes) -> bytes:
    return re.split(rb"\r?\n\r?\n", entity, maxsplit=1)[1]


def der_of(entity: bytes) -> bytes:
    """The CMS object in an entity of base64."""
    assert re.search(rb"(?im)^content-transfer-encoding: base64", entity)
    return base64.b64decode(body_of(entity), validate=False)


def cut_signed(entity: bytes) -> tuple[bytes, bytes]:
    """The signed part of a multipart/signed, with line ends of CRLF, and the DER signature beside it."""
    message = email.message_from_bytes(entity)
    assert message.get_content_type() == "multipart/signed"
    assert message.get_param("protocol") == "application/pkcs7-signature"
    assert message.get_param("micalg") == "sha-256"
    boundary = message.get_boundary()
    assert boundary
    wire = re.sub(rb"\r?\n", b"\r\n", entity)
    _, signed, signature, rest = wire.split(b"--" + boundary.encode())
    assert rest == b"--\r\n"
    assert b"smime.p7s" in signature
    return signed[2:-2], der_of(signature[2:])


class Openssl:
    def __init__(self, folder: Path, root: bytes) -> None:
        self.folder = folder
        self.folder.mkdir(exist_ok=True)
        (folder / "root.pem").write_bytes(root)

    def decrypt(self, entity: bytes, identity: Identity) -> bytes:
        (self.folder / "key.pem").write_bytes(key_pem(identity.key))
        (self.folder / "own.pem").write_bytes(certificate_pem(identity.certificate))
        (self.folder / "mail").write_bytes(der_of(entity))
        return command(
            *("openssl", "cms", "-decrypt", "-binary", "-inform", "DER", "-in", self.folder / "mail"),
            *("-recip", self.folder / "own.pem", "-inkey", self.folder / "key.pem"),
        )

    def verify(self, entity: bytes) -> bytes:
        """The content that is signed, from a multipart/signed or a signed-data entity."""
        arguments = ["-CAfile", str(self.folder / "root.pem"), "-purpose", "smimesign"]
        if b"multipart/signed" in entity[:100]:
            content, signature = cut_signed(entity)
            (self.folder / "content").write_bytes(content)
            (self.folder / "mail").write_bytes(entity)
            command("openssl", "cms", "-verify", "-in", self.folder / "mail", *arguments)  # as a mail reader does
            arguments += ["-content", str(self.folder / "content")]
        else:
            signature = der_of(entity)
        (self.folder / "signature").write_bytes(signature)
        return command(
            *("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", self.folder / "signature"), *arguments
        )


def pkcs12(identity: Identity, folder: Path) -> Path:
    """Key, certificate and chain in the older form that gpgsm and NSS read; the password is x."""
    (folder / "in.pem").write_bytes(key_pem(identity.key) + identity.chain_pem)
    command(
        *("openssl", "pkcs12", "-export", "-legacy", "-in", folder / "in.pem", "-name", identity.address),
        *("-passout", "pass:x", "-out", folder / "out.p12"),
    )
    return folder / "out.p12"


class Gpgsm:
    def __init__(self, folder: Path, root: bytes, identities: list[Identity]) -> None:
        folder.mkdir(mode=0o700)
        self.home = folder
        (folder / "gpgsm.conf").write_text("disable-crl-checks\ndisable-dirmngr\n")
        (folder / "gpg-agent.conf").write_text("no-allow-mark-trusted\nallow-loopback-pinentry\n")
        (folder / "root.pem").write_bytes(root)
        text = command("openssl", "x509", "-in", folder / "root.pem", "-noout", "-fingerprint", "-sha1").decode()
        (folder / "trustlist.txt").write_text(text.strip().split("=")[1] + " S\n")
        self._run("--import", folder / "root.pem")
        for identity in identities:
            self._import(identity)

    def _import(self, identity: Identity) -> None:
        """Import a key; gpgsm 2.2 misreads a PKCS #12 file now and then (1 of 460 here), but not the next one."""
        for attempt in range(5):
            try:
                self._run("--import", pkcs12(identity, self.home))
                return
            except AssertionError:
                if attempt == 4:
                    raise

    def _run(self, *words: str | Path) -> bytes:
        options = ("--homedir", self.home, "--batch", "--yes", "--pinentry-mode", "loopback", "--passphrase-fd", "0")
        return command("gpgsm", *options, *words, data=b"x\n")

    def decrypt(self, entity: bytes) -> bytes:
        (self.home / "mail").write_bytes(der_of(entity))
        return self._run("--decrypt", self.home / "mail")

    def verify(self, entity: bytes) -> bytes:
        content, signature = cut_signed(entity)
        (self.home / "content").write_bytes(content)
        (self.home / "signature").write_bytes(signature)
        self._run("--verify", self.home / "signature", self.home / "content")
        return content

    def stop(self) -> None:
        subprocess.run(["gpgconf", "--homedir", self.home, "--kill", "all"], capture_output=True)


class Nss:
    def __init__(self, folder: Path, root: bytes, identities: list[Identity]) -> None:
        folder.mkdir()
        self.folder = folder
        self.store = f"sql:{folder}"
        (folder / "root.pem").write_bytes(root)
        command("certutil", "-N", "-d", self.store, "--empty-password")
        command("certutil", "-A", "-d", self.store, "-n", "root", "-t", "C,C,C", "-i", folder / "root.pem", "-a")
        for identity in identities:
            command("pk12util", "-i", pkcs12(identity, folder), "-d", self.store, "-W", "x", "-K", "")

    def decrypt(self, entity: bytes) -> bytes:
        (self.folder / "mail").write_bytes(der_of(entity))
        return command("cmsutil", "-D", "-d", self.store, "-i", self.folder / "mail")

    def verify(self, entity: bytes) -> bytes:
        content, signature = cut_signed(entity)
        (self.folder / "content").write_bytes(content)
        (self.folder / "signature").write_bytes(signature)
        return command(
            *("cmsutil", "-D", "-d", self.store, "-c", self.folder / "content", "-i", self.folder / "signature")
        )
