"""The floor: what every Python program must do to sign, encrypt and send messages, and nothing besides."""

import smtplib
import sys
from base64 import encodebytes

from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7EnvelopeBuilder, PKCS7Options, PKCS7SignatureBuilder
from cryptography.x509 import load_pem_x509_certificates

SIGNED = b"Content-Type: multipart/signed; protocol=application/pkcs7-signature; micalg=sha-256; boundary=b\r\n\r\n"
SIGNATURE = b"Content-Type: application/pkcs7-signature\r\nContent-Transfer-Encoding: base64\r\n\r\n"
SEALED = (
    b"\r\nContent-Type: application/pkcs7-mime; smime-type=enveloped-data\r\nContent-Transfer-Encoding: base64\r\n\r\n"
)

sender, recipient, port, *files = sys.argv[1:]
with open(sender + ".pem", "rb") as private, open(sender + ".crt", "rb") as public:
    key, (own, issuer) = load_pem_private_key(private.read(), None), load_pem_x509_certificates(public.read())
with open(recipient + ".crt", "rb") as public:
    certificate = load_pem_x509_certificates(public.read())[0]
with smtplib.SMTP("127.0.0.1", int(port), "[127.0.0.1]") as session:
    for file in files:
        with open(file, "rb") as message:
            header, _, body = message.read().replace(b"\n", b"\r\n").partition(b"\r\nMIME-")
        entity = b"MIME-" + body
        signer = PKCS7SignatureBuilder().set_data(entity).add_signer(own, key, SHA256()).add_certificate(issuer)  # type: ignore[arg-type]
        signature = encodebytes(signer.sign(Encoding.DER, [PKCS7Options.Binary, PKCS7Options.DetachedSignature]))
        signed = b"%b--b\r\n%b\r\n--b\r\n%b%b--b--\r\n" % (SIGNED, entity, SIGNATURE, signature.replace(b"\n", b"\r\n"))
        seal = PKCS7EnvelopeBuilder().set_data(signed).set_content_encryption_algorithm(AES256)
        sealed = encodebytes(seal.add_recipient(certificate).encrypt(Encoding.DER, [PKCS7Options.Binary]))
        session.sendmail(sender, [recipient], header + SEALED + sealed.replace(b"\n", b"\r\n"))
