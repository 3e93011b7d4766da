"""Other programs decrypt and verify what the program makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import BOB, SAMPLES, STEVE, STEVET, Run, mail
from pki import Authority
from readers import Gpgsm, Nss, Openssl, body_of

BIG = b"".join(b"Line %06d of a long letter, which goes on and on.\r\n" % n for n in range(577_000 // 52))


def inner(output: bytes) -> bytes:
    """The entity that a message's outer header ends with."""
    return output[re.search(rb"(?m)^Content-Type:", output).start() :]  # type: ignore[union-attr]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_every_reader_verifies_a_signed_sample(path: Path, run: Run, openssl: Openssl, gpgsm: Gpgsm, nss: Nss) -> None:
    done = run(path, "--sign")
    assert done.returncode == 0, done.stderr
    entity = inner(done.stdout)
    content = openssl.verify(entity)
    assert gpgsm.verify(entity) == content
    nss.verify(entity)
    assert content.isascii()
    assert b"\n" not in content.replace(b"\r\n", b"")


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_every_reader_opens_an_encrypted_sample(
    path: Path, run: Run, openssl: Openssl, gpgsm: Gpgsm, nss: Nss, authority: Authority
) -> None:
    done = run(path, "--sign", "--encrypt")
    assert done.returncode == 0, done.stderr
    entity = inner(done.stdout)
    assert b"smime-type=enveloped-data" in entity
    signed = openssl.decrypt(entity, authority.identity(STEVET))
    assert gpgsm.decrypt(entity) == signed
    assert nss.decrypt(entity) == signed
    content = openssl.verify(signed)
    assert gpgsm.verify(signed) == content


def test_a_large_message_opens_and_verifies_everywhere(
    run: Run, openssl: Openssl, gpgsm: Gpgsm, nss: Nss, authority: Authority
) -> None:
    done = run("-", "--sign", "--encrypt", data=mail(BIG, To=f"{STEVET}, {BOB}"))
    assert done.returncode == 0, done.stderr
    entity = inner(done.stdout)
    signed = openssl.decrypt(entity, authority.identity(BOB))
    assert gpgsm.decrypt(entity) == nss.decrypt(entity) == signed
    assert body_of(openssl.verify(signed)) == BIG
    gpgsm.verify(signed)
    nss.verify(signed)


def test_opaque_signatures_are_read_everywhere(run: Run, openssl: Openssl, nss: Nss, authority: Authority) -> None:
    done = run("-", "--sign", "--opaque", data=mail())
    entity = inner(done.stdout)
    assert b"smime-type=signed-data" in entity
    assert b"name=smime.p7m" in entity
    content = openssl.verify(entity)
    assert content == b"Content-Type: text/plain\r\n\r\nHello Steve\r\n"
    assert nss.decrypt(entity) == content


def test_signature_holds_certificate_and_chain(run: Run, openssl: Openssl, folder: Path) -> None:
    """The root is all that the reader has; the intermediate comes with the message."""
    content = openssl.verify(inner(run("-", "--sign", data=mail()).stdout))
    assert b"Hello Steve" in content


def test_any_changed_byte_of_the_signed_part_is_found(run: Run, openssl: Openssl) -> None:
    entity = inner(run("-", "--sign", data=mail()).stdout)
    with pytest.raises(AssertionError, match=r"digest|verif"):
        openssl.verify(entity.replace(b"Hello Steve", b"Hullo Steve"))


def test_a_stranger_cannot_decrypt(run: Run, openssl: Openssl, authority: Authority) -> None:
    entity = inner(run("-", "--encrypt", data=mail()).stdout)
    with pytest.raises(AssertionError):
        openssl.decrypt(entity, authority.identity(STEVE))
