"""The README says what the program does."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import STEVE, STEVET, TESTS, Run, mail
from cryptography import x509
from pki import Authority
from readers import Openssl, command
from test_readers import inner

README = (TESTS.parent / "README.md").read_text()


def test_the_options_are_those_of_the_help(run: Run) -> None:
    (block,) = re.findall(r"## Options\n\n```\n(.*?)```", README, re.DOTALL)
    assert run("--help").stdout.decode() == block


def test_every_variable_is_explained_and_in_the_example() -> None:
    example = set(re.findall(r"^export (\w+)=", (TESTS.parent / "my_envs.sh.example").read_text(), re.MULTILINE))
    rows = {
        name for row in re.findall(r"^\| (`[A-Z_`, ]+`) \|", README, re.MULTILINE) for name in re.findall(r"\w+", row)
    }
    assert example == rows


def test_the_openssl_commands_for_keys_work(
    run: Run, folder: Path, authority: Authority, openssl: Openssl, root: bytes
) -> None:
    """A .p12 splits into the .pem, and a signed mail yields its sender's certificate."""
    identity = authority.identity(STEVE)
    for suffix in ("pem", "crt"):
        (folder / f"{STEVE}.{suffix}").rename(folder / f"own.{suffix}")
    words = (
        "openssl",
        "pkcs12",
        "-export",
        "-inkey",
        "own.pem",
        "-in",
        "own.crt",
        "-passout",
        "pass:x",
        "-out",
        "steve.p12",
    )
    command("sh", "-c", f"cd '{folder}' && {' '.join(words)}")
    splits, takes = re.findall(r"^    (openssl pkcs12 .*|openssl cms .*)$", README, re.MULTILINE)
    command("sh", "-c", f"cd '{folder}' && umask 077 && {splits} -passin pass:x")
    done = run("-", "--sign", data=mail())
    assert done.returncode == 0, done.stderr
    openssl.verify(inner(done.stdout))
    (folder / "signed.eml").write_bytes(done.stdout)
    command("sh", "-c", f"cd '{folder}' && {takes}")
    taken = x509.load_pem_x509_certificates((folder / f"{STEVET}.crt").read_bytes())
    assert set(taken) == {identity.certificate, *identity.chain}
