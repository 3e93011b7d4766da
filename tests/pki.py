"""A certificate authority of the tests' own, and the key files that the program reads."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)
EMAIL = ExtendedKeyUsageOID.EMAIL_PROTECTION
UTF8_MAILBOX = x509.ObjectIdentifier("1.3.6.1.5.5.7.8.9")  # RFC 9598
USAGES = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
USAGES += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def new_key(kind: str = "rsa") -> PrivateKey:
    """A key of 2048 bits for "rsa", of 1024 for "rsa-1024", or on the NIST curve named."""
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[4:] or 2048))
    return ec.generate_private_key(CURVES[kind])


def encryption(password: str) -> serialization.KeySerializationEncryption:
    if password:
        return serialization.BestAvailableEncryption(password.encode())
    return serialization.NoEncryption()


def key_pem(key: PrivateKey, password: str = "") -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption(password))


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def certificate_der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def distinguished_name(text: str, emails: Sequence[str] = ()) -> x509.Name:
    addresses = [x509.NameAttribute(NameOID.EMAIL_ADDRESS, email) for email in emails]
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64]), *addresses])


def utf8_mailbox(address: str) -> x509.OtherName:
    raw = address.encode()
    return x509.OtherName(UTF8_MAILBOX, bytes([0x0C, len(raw)]) + raw)  # a UTF8String, of under 128 bytes


@dataclass
class Authority:
    """A root, an intermediate below it, and the identities that the intermediate certifies."""

    identities: dict[tuple[str, str], Identity] = field(default_factory=dict)
    purposes: Sequence[x509.ObjectIdentifier] = ()  # that the intermediate is limited to

    @cached_property
    def root_key(self) -> PrivateKey:
        return new_key("P-256")

    @cached_property
    def root(self) -> x509.Certificate:
        name = distinguished_name("Tests Root")
        return certify(name, self.root_key, name, self.root_key, authority=True)

    @cached_property
    def intermediate_key(self) -> PrivateKey:
        return new_key("P-256")

    @cached_property
    def intermediate(self) -> x509.Certificate:
        name, purposes = distinguished_name("Tests Issuing"), self.purposes
        return certify(name, self.intermediate_key, self.root.subject, self.root_key, authority=True, purposes=purposes)

    def identity(self, address: str, kind: str = "rsa") -> Identity:
        """The identity of an address, made once."""
        if (address, kind) not in self.identities:
            self.identities[address, kind] = self.issue(address, new_key(kind))
        return self.identities[address, kind]

    def issue(
        self,
        address: str,
        key: PrivateKey,
        begin: datetime.datetime = NOW - DAY,
        days: int = 365,
        *,
        san: Sequence[str] | None = None,
        utf8: Sequence[str] = (),
        subject: Sequence[str] = (),
        usages: Sequence[str] | None = None,
        purposes: Sequence[x509.ObjectIdentifier] = (EMAIL,),
    ) -> Identity:
        """A new leaf. It names the addresses in `san`, `utf8` and `subject`; without these the address, if ASCII."""
        if san is None:
            san = [address] if address.isascii() and "@" in address else []
        names = [*(x509.RFC822Name(name) for name in san), *(utf8_mailbox(name) for name in utf8)]
        certificate = certify(
            distinguished_name(f"Tests {address}", subject),
            key,
            self.intermediate.subject,
            self.intermediate_key,
            names=names,
            usages=usages,
            purposes=purposes,
            begin=begin,
            days=days,
        )
        return Identity(address, key, certificate, self)


def certify(
    subject: x509.Name,
    key: PrivateKey,
    issuer: x509.Name,
    issuer_key: PrivateKey,
    *,
    authority: bool | None = False,
    names: Sequence[x509.GeneralName] = (),
    usages: Sequence[str] | None = None,
    purposes: Sequence[x509.ObjectIdentifier] = (),
    more: Sequence[x509.ExtensionType] = (),
    begin: datetime.datetime = NOW - 1000 * DAY,
    days: int = 5000,
) -> x509.Certificate:
    """A certificate, with the usual key usage unless `usages` says another; what is empty or None gets no extension."""
    if usages is None:
        agreement = "key_agreement" if isinstance(key, ec.EllipticCurvePrivateKey) else "key_encipherment"
        usages = ["key_cert_sign", "crl_sign"] if authority else ["digital_signature", agreement]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + days * DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if authority is not None:
        builder = builder.add_extension(x509.BasicConstraints(authority, None), critical=True)
    if usages:
        usage = x509.KeyUsage(**{usage: usage in usages for usage in USAGES})
        builder = builder.add_extension(usage, critical=True)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for value in more:
        builder = builder.add_extension(value, critical=isinstance(value, x509.CertificatePolicies))
    return builder.sign(issuer_key, hashes.SHA256())


@dataclass
class Identity:
    """A key pair of an address."""

    address: str
    key: PrivateKey
    certificate: x509.Certificate
    authority: Authority
    issuers: Sequence[x509.Certificate] | None = None  # in its file; the intermediate unless told

    @property
    def chain(self) -> list[x509.Certificate]:
        return [self.authority.intermediate] if self.issuers is None else list(self.issuers)

    @property
    def chain_pem(self) -> bytes:
        return b"".join(certificate_pem(certificate) for certificate in (self.certificate, *self.chain))

    def pkcs12(self, password: str = "", *, private: bool = True) -> bytes:
        """All in one, as Windows exports it; without `private` the certificates alone."""
        key = self.key if private else None
        return pkcs12.serialize_key_and_certificates(b"", key, self.certificate, self.chain, encryption(password))

    def write(self, folder: Path, *, private: bool = False, name: str = "") -> None:
        """Write ADDRESS.crt, and with `private` ADDRESS.pem."""
        name = name or self.address
        (folder / f"{name}.crt").write_bytes(self.chain_pem)
        if private:
            path = folder / f"{name}.pem"
            path.touch(mode=0o600)
            path.write_bytes(key_pem(self.key))
