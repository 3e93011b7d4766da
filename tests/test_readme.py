"""The README says what the program does."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import SCRIPT, STEVE, STEVET, TESTS, Run, mail
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


def test_as_a_module_it_is_compiled_once(folder: Path, authority: Authority, openssl: Openssl) -> None:
    shutil.copy(SCRIPT, folder)
    (folder / "message.eml").write_bytes(mail())
    (line,) = re.findall(r"^    \.venv/bin/python (-m sparkpostSMIME .*) --send_smtp$", README, re.MULTILINE)
    words = [sys.executable, "-v", *shlex.split(line)]
    first, second = (subprocess.run(words, cwd=folder, env={}, capture_output=True, timeout=60) for _ in range(2))
    kept = b"# code object from '%b" % str(folder / "__pycache__" / "sparkpostSMIME.").encode()
    assert (kept in first.stderr, kept in second.stderr) == (False, True)
    for done in (first, second):
        assert done.returncode == 0
        openssl.verify(openssl.decrypt(inner(done.stdout), authority.identity(STEVET)))
