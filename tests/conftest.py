"""What the tests share. Every test runs the program as a user does, in a folder of its own."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pki import Authority, certificate_pem, key_pem
from readers import Gpgsm, Nss, Openssl

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "sparkpostSMIME.py"
SAMPLES = sorted(TESTS.glob("*.eml"))
STEVE, STEVET, BOB, CAROL = (
    "steve@thetucks.com",
    "steve.tuck@sparkpost.com",
    "bob.lumreeker@gmail.com",
    "carol@thetucks.com",
)
PASSWORD, API_KEY, KEY_PASSWORD = "smtp-secret-7Qx9", "api-secret-b41f00d5c0ffee", "key-secret-Zk3w"

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


def need(*programs: str, root: bool = False) -> None:
    """Skip the test where programs that it drives are missing; in CI nothing may be missing."""
    missing = [program for program in programs if not shutil.which(program)] + ["root"] * (root and os.geteuid() != 0)
    if missing and "CI" not in os.environ:
        pytest.skip(f"needs {', '.join(missing)}")
    assert not missing, missing


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def root(authority: Authority) -> bytes:
    return certificate_pem(authority.root)


@pytest.fixture(scope="session")
def openssl(tmp_path_factory: pytest.TempPathFactory, root: bytes) -> Openssl:
    return Openssl(tmp_path_factory.mktemp("openssl"), root)


@pytest.fixture(scope="session")
def gpgsm(tmp_path_factory: pytest.TempPathFactory, authority: Authority, root: bytes) -> Iterator[Gpgsm]:
    need("gpgsm", "gpgconf")
    reader = Gpgsm(tmp_path_factory.mktemp("g") / "home", root, [authority.identity(STEVET), authority.identity(BOB)])
    yield reader
    reader.stop()


@pytest.fixture(scope="session")
def nss(tmp_path_factory: pytest.TempPathFactory, authority: Authority, root: bytes) -> Nss:
    need("certutil", "pk12util", "cmsutil")
    return Nss(tmp_path_factory.mktemp("n") / "db", root, [authority.identity(STEVET), authority.identity(BOB)])


@pytest.fixture
def folder(tmp_path: Path, authority: Authority) -> Path:
    """A folder with the key files of Steve, who signs, and of the usual recipients; the program runs in it."""
    for address in (STEVE, STEVET, BOB, CAROL):
        authority.identity(address).write(tmp_path, private=address == STEVE)
    return tmp_path


@pytest.fixture
def run(folder: Path, authority: Authority) -> Run:
    """Run the program with these arguments, and with the variables given as keywords; no output holds a secret."""
    secrets = [PASSWORD, API_KEY, KEY_PASSWORD, base64.b64encode(PASSWORD.encode()).decode()]
    secrets += key_pem(authority.identity(STEVE).key).decode().splitlines()[8:-1]  # after the public modulus

    def run(*arguments: str | Path, data: bytes | None = None, **variables: str) -> subprocess.CompletedProcess[bytes]:
        inherited = ("PATH", "LANG", "LC_ALL", "HOME", "COVERAGE_PROCESS_START")
        environment = {name: os.environ[name] for name in inherited if name in os.environ} | variables
        done = subprocess.run(
            [sys.executable, SCRIPT, *arguments],
            cwd=folder,
            env=environment,
            input=data if data is not None else b"",
            capture_output=True,
            timeout=120,
        )
        output = done.stdout + done.stderr
        assert b"Traceback" not in output, output.decode(errors="replace")
        for secret in secrets:
            assert secret.encode() not in output, "a secret is in the output"
        return done

    return run


def mail(body: bytes = b"Hello Steve\r\n", **fields: str) -> bytes:
    """A small message; a field given as None is left out, From_ stands for From."""
    header = {"From": f"Steve <{STEVE}>", "To": f"SteveT <{STEVET}>", "Subject": "A test"}
    header |= {name.rstrip("_").replace("_", "-"): value for name, value in fields.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in header.items() if value is not None)
    return lines.encode() + b"\r\n" + body
