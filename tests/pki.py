"""A certificate authority of the tests' own, and the key files that the program reads."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


def new_key(kind: str = "rsa") -> PrivateKey:
    """A key of 2048 bits for "rsa", or on the NIST curve named."""
    if kind == "rsa":
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key({"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}[kind])


def key_pem(key: PrivateKey, password: str = "") -> bytes:
    encryption: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    )
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@dataclass
class Authority:
    """A root, an intermediate below it, and the identities that the intermediate certifies."""

    identities: dict[tuple[str, str], Identity] = field(default_factory=dict)

    @cached_property
    def root_key(self) -> PrivateKey:
        return new_key("P-256")

    @cached_property
    def root(self) -> x509.Certificate:
        return self._certify("Tests Root", self.root_key, "Tests Root", self.root_key, authority=True)

    @cached_property
    def intermediate_key(self) -> PrivateKey:
        return new_key("P-256")

    @cached_property
    def intermediate(self) -> x509.Certificate:
        return self._certify("Tests Issuing", self.intermediate_key, "Tests Root", self.root_key, authority=True)

    def identity(self, address: str, kind: str = "rsa") -> Identity:
        """The identity of an address, made once."""
        if (address, kind) not in self.identities:
            self.identities[address, kind] = self.issue(address, new_key(kind))
        return self.identities[address, kind]

    def issue(self, address: str, key: PrivateKey, begin: datetime.datetime = NOW - DAY, days: int = 365) -> Identity:
        certificate = self._certify(
            f"Tests {address}", key, "Tests Issuing", self.intermediate_key, address=address, begin=begin, days=days
        )
        return Identity(address, key, certificate, self)

    def _certify(
        self,
        subject: str,
        key: PrivateKey,
        issuer: str,
        issuer_key: PrivateKey,
        *,
        address: str = "",
        authority: bool = False,
        begin: datetime.datetime = NOW - DAY,
        days: int = 3650,
    ) -> x509.Certificate:
        def name(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])

        usages = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
        usages += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
        wanted = ["key_cert_sign", "crl_sign"] if authority else ["digital_signature", "key_encipherment"]
        if not authority and isinstance(key, ec.EllipticCurvePrivateKey):
            wanted = ["digital_signature", "key_agreement"]
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + days * DAY)
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.KeyUsage(**{usage: usage in wanted for usage in usages}), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if address:
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(usage, critical=False)
        if address.isascii() and "@" in address:
            names = x509.SubjectAlternativeName([x509.RFC822Name(address)])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(issuer_key, hashes.SHA256())


@dataclass
class Identity:
    """A key pair of an address."""

    address: str
    key: PrivateKey
    certificate: x509.Certificate
    authority: Authority

    @property
    def chain_pem(self) -> bytes:
        return certificate_pem(self.certificate) + certificate_pem(self.authority.intermediate)

    def write(self, folder: Path, *, private: bool = False, name: str = "") -> None:
        """Write ADDRESS.crt, and with `private` ADDRESS.pem."""
        name = name or self.address
        (folder / f"{name}.crt").write_bytes(self.chain_pem)
        if private:
            path = folder / f"{name}.pem"
            path.touch(mode=0o600)
            path.write_bytes(key_pem(self.key))
