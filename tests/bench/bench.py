"""How fast the program is, and how much memory it takes: each part of the bench yields rows of the table it prints.

The machine's noise is met by turns: runs to be compared alternate, and the fastest of each counts. Everything is on
loopback and in a temporary folder.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from base64 import encodebytes
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cryptography
from pki import Authority, certificate_pem
from sinks import SmtpSink, api_server, proxy_server

TESTS = Path(__file__).parent.parent
SCRIPT, FLOOR, FANCY = TESTS.parent / "sparkpostSMIME.py", TESTS / "bench" / "floor.py", TESTS / "fancy-HTML-to-smt.eml"
STEVE, STEVET = "steve@thetucks.com", "steve.tuck@sparkpost.com"
KB, MB = 1_000, 1_000_000
DELAY = 0.05  # seconds, each way
HEADER = f"From: Steve <{STEVE}>\nTo: SteveT <{STEVET}>\nSubject: Bench\nMIME-Version: 1.0\n".encode()
PART = b"Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64\n\n"
PIPELINE = """
openssl cms -sign -in {file} -signer {signer}.crt -inkey {signer}.pem -certfile chain.pem |
openssl cms -encrypt -aes256 -from {signer} -to {recipient} -subject Pipeline {recipient}.crt |
curl --silent --show-error smtp://127.0.0.1:{port} --mail-from {signer} --mail-rcpt {recipient} --upload-file -"""
TEN_TIMES = 'for i in 1 2 3 4 5 6 7 8 9 10; do "$@" || exit; done'
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""  # from a small process: its peak is its children's too


class Row(NamedTuple):
    what: str
    measured: str
    target: str = "-"
    reached: bool | None = None

    def __str__(self) -> str:
        reached = "-" if self.reached is None else "yes" if self.reached else "**no**"
        return f"| {self.what} | {self.measured} | {self.target} | {reached} |"


class Usage(NamedTuple):
    """Seconds of the clock, and of the processors for a process and its children."""

    wall: float
    cpu: float


Run = Callable[[], Usage]


class Bench:
    """Keys, messages and servers, and the ways to run a program with them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        authority = Authority()
        for address in (STEVE, STEVET):
            authority.identity(address).write(folder, private=address == STEVE)
        (folder / "chain.pem").write_bytes(certificate_pem(authority.intermediate))
        self.folder, self.api, self.sink = folder, api_server(folder, authority), SmtpSink()
        stack.callback(self.sink.stop)

    def messages(self, count: int, size: int | None = None) -> Path:
        """A folder with so many messages, each of this size in bytes; where none is told, the mission's 19 KB."""
        folder = self.folder / f"{count}x{size}"
        if not folder.exists():
            content = FANCY.read_bytes() if size is None else message(size)
            folder.mkdir()
            for number in range(count):
                (folder / f"{number:04}.eml").write_bytes(content)
        return folder

    def message(self, size: int | None = None) -> Path:
        return self.messages(1, size) / "0000.eml"

    def program(self, *arguments: object, api: bool = False) -> list[str]:
        way = "--send_api" if api else "--send_smtp"
        return [str(each) for each in (sys.executable, SCRIPT, *arguments, "--sign", "--encrypt", way)]

    def environment(self, smtp_port: int = 0, api_port: int = 0) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(SCRIPT.parent),  # for -m
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(smtp_port or self.sink.port),
            "SPARKPOST_API_KEY": "key",
            "SPARKPOST_HOST": f"https://localhost:{api_port or self.api.port}",
            "SSL_CERT_FILE": str(self.folder / "root.pem"),
        }

    def run(self, command: list[str], **ports: int) -> Usage:
        """Raises CalledProcessError where the command fails."""
        environment, started = self.environment(**ports), time.perf_counter()
        process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return Usage(time.perf_counter() - started, usage.ru_utime + usage.ru_stime)

    def floor(self, *files: Path) -> Run:
        names = [str(FLOOR), STEVE, STEVET, str(self.sink.port), *map(str, files)]
        return partial(self.run, [sys.executable, *names])

    def pipeline(self) -> Run:
        names = {"file": self.message(), "signer": STEVE, "recipient": STEVET, "port": self.sink.port}
        return partial(self.run, ["bash", "-c", "set -o pipefail" + PIPELINE.format(**names)])

    def peak(self, command: list[str]) -> int:
        """The most memory that a command has in use, in bytes."""
        command = [sys.executable, "-I", "-c", PEAK, *command]
        done = subprocess.run(command, cwd=self.folder, env=self.environment(), check=True, capture_output=True)
        return 1024 * int(done.stdout)


def message(size: int) -> bytes:
    """A message of so many bytes, an attachment in base64 the most of them; one of 0 has a header only."""
    if not size:
        return HEADER + b"\n"
    content = encodebytes(os.urandom(size))[: max(0, size - len(HEADER + PART) - 1)]
    return HEADER + PART + content + b"\n"


def by_turns(turns: int, *runs: Run) -> list[Usage]:
    """The least that each of these runs takes."""
    rounds = [[run() for run in runs] for _ in range(turns)]
    return [Usage(*map(min, zip(*usages, strict=True))) for usages in zip(*rounds, strict=True)]


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def at_most(what: str, value: float, limit: float, unit: str, measured: str) -> Row:
    return Row(what, f"{value:.2f} {unit}: {measured}", f"at most {limit:.2f} {unit}", value <= limit)


def at_least(what: str, value: float, limit: float, unit: str, measured: str) -> Row:
    return Row(what, f"{value:.2f} {unit}: {measured}", f"at least {limit:.2f} {unit}", value >= limit)


# ------------------------------------------------------------------------------------------------------- parts


def one_message(bench: Bench) -> Iterator[Row]:
    """(a) A whole process, from the start of Python to the end of the SMTP session."""
    file = bench.message()
    python, _, *arguments = bench.program(file)
    module = [python, "-m", SCRIPT.stem, *arguments]
    runs = (partial(bench.run, command) for command in (bench.program(file), module))
    program, kept, least, pipeline = (usage.wall for usage in by_turns(40, *runs, bench.floor(file), bench.pipeline()))
    for how, wall in (("", program), (", as `python -m`", kept)):
        times = f"{ms(wall)}, the floor {ms(least)}"
        yield at_most(f"(a) one message, whole process{how}", wall / least, 1.1, "x the floor", times)
    yield Row("(a) against `openssl \\| openssl \\| curl`", f"{program / pipeline:.2f} x its {ms(pipeline)}")


def many_messages(bench: Bench) -> Iterator[Row]:
    """(b) A mailing; all that its process and children take, shared among the messages."""
    count, sink = 1000, bench.sink.cpu
    folder = bench.messages(count)
    runs = [partial(bench.run, bench.program(folder, "--jobs", jobs)) for jobs in (1, 2)]
    runs.append(bench.floor(*folder.iterdir()))
    signature, pipeline, one_job, two_jobs, floor = by_turns(5, signature_time, bench.pipeline(), *runs)
    sink = (bench.sink.cpu - sink) / (5 * len(runs) * count)
    wall = one_job.wall / count
    what, cpu = f"(b) a run of {count:,} messages, ", f"{ms(one_job.cpu / count)}, the signature {ms(signature.cpu)}"
    yield at_most(what + "CPU per message", one_job.cpu / count / signature.cpu, 3, "x an RSA-2048 signature", cpu)
    shares = f"CPU {one_job.cpu / floor.cpu:.2f} x its {ms(floor.cpu / count)}, wall {one_job.wall / floor.wall:.2f} x"
    yield Row(what + "against the floor's calls in a loop", shares)
    cpu = f"{two_jobs.cpu / count / signature.cpu:.2f} x an RSA-2048 signature: {ms(two_jobs.cpu / count)}"
    yield Row(what + "CPU per message with `--jobs 2`", cpu)
    both = count * pipeline.wall / two_jobs.wall
    times = f"{ms(wall)} a message, the pipeline {ms(pipeline.wall)}; with `--jobs 2` {both:.1f} messages"
    yield at_least(what + "in the pipeline's time for one", pipeline.wall / wall, 20, "messages", times)
    times = f"{count / two_jobs.wall:.0f} and {1 / wall:.0f} per second; the sink takes {ms(sink)} CPU of each"
    yield at_least(what + "`--jobs 2`", one_job.wall / two_jobs.wall, 1.7, "x as fast as `--jobs 1`", times)


def signature_time() -> Usage:
    """One signature by RSA-2048, as openssl measures it."""
    command = ["openssl", "speed", "-seconds", "1", "rsa2048"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"rsa +2048 bits +([0-9.]+)s", done.stdout)
    assert found, done.stdout
    return Usage(float(found[1]), float(found[1]))


def race(bench: Bench) -> Iterator[Row]:
    """(c) SMTP against API, as the mission races them: ten processes, one after the other; and ten in one run."""
    for name, size in (("19 KB", None), ("577 KB", 577 * KB)):
        loop = [["bash", "-c", TEN_TIMES, "-", *bench.program(bench.message(size), api=api)] for api in (False, True)]
        one_run = [bench.program(bench.messages(10, size), api=api) for api in (False, True)]
        smtp, api, smtp_run, api_run = (
            usage.wall / 10 for usage in by_turns(3, *(partial(bench.run, each) for each in loop + one_run))
        )
        yield Row(f"(c) {name}, ten times in a bash loop", f"SMTP {ms(smtp)}, API {ms(api)} a message")
        yield Row(f"(c) {name}, ten in one run", f"SMTP {ms(smtp_run)}, API {ms(api_run)} a message")


def round_trips(bench: Bench) -> Iterator[Row]:
    """(d) What ten more messages take on a long way, so that connecting does not count; their work is in it."""
    few, many = bench.messages(2), bench.messages(12)
    smtp, api = (proxy_server(port, DELAY).port for port in (bench.sink.port, bench.api.port))
    for name, limit, flag in (("SMTP", 2.2, False), ("API", 1.1, True)):
        commands = [bench.program(folder, api=flag) for folder in (few, many)]
        near = by_turns(3, *(partial(bench.run, command) for command in commands))
        far = by_turns(2, *(partial(bench.run, command, smtp_port=smtp, api_port=api) for command in commands))
        trips, work = ((many.wall - few.wall) / 10 / (2 * DELAY) for few, many in (far, near))
        what = f"(d) a message by {name}, {2 * DELAY * 1000:.0f} ms away and back"
        yield at_most(what, trips, limit, "round trips", f"{work:.2f} of it is work")


def memory(bench: Bench) -> Iterator[Row]:
    """(e) The peak of a process with a large message, above one with an empty message."""
    large, empty = (bench.peak(bench.program(bench.message(size))) for size in (25 * MB, 0))
    peaks = f"{large / MB:.0f} MB, with an empty one {empty / MB:.0f} MB"
    yield at_most("(e) memory for a message of 25 MB", (large - empty) / (25 * MB), 4.5, "x 25 MB", peaks)


def growth(bench: Bench) -> Iterator[Row]:
    """(f) 25 MB in messages of several sizes in one run, less a run of as many empty messages, each byte's share."""
    sizes, runs = (19 * KB, 577 * KB, 5 * MB, 25 * MB), []
    counts = [25 * MB // size for size in sizes]
    for size, count in zip(sizes, counts, strict=True):
        runs += [partial(bench.run, bench.program(bench.messages(count, each))) for each in (size, 0)]
    walls = [usage.wall for usage in by_turns(4, *runs)]
    parts = zip(sizes, counts, walls[::2], walls[1::2], strict=True)
    shares = [1e9 * (full - empty) / (size * count) for size, count, full, empty in parts]
    shown = ", ".join(f"{size / MB:.3g} MB {share:.1f} ns" for size, share in zip(sizes, shares, strict=True))
    yield at_most("(f) time per byte, from 577 KB to 25 MB", max(shares[1:]) / min(shares[1:]), 1.3, "x", shown)


PARTS = {"a": one_message, "b": many_messages, "c": race, "d": round_trips, "e": memory, "f": growth}


def processor_seconds() -> float:
    """What all processors have worked since the machine started, for whomever."""
    user, nice, system, _, _, *others = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def main(wanted: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that all is cleaned up
    if set(wanted) - set(PARTS):
        sys.exit(f"usage: run.sh [{'] ['.join(PARTS)}]")
    started, worked, processors = time.perf_counter(), processor_seconds(), os.cpu_count() or 1
    print("| what | measured | target | reached |\n|---|---|---|---|", flush=True)
    with ExitStack() as stack:
        bench = Bench(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))), stack)
        for part in wanted or PARTS:
            for row in PARTS[part](bench):
                print(row, flush=True)
        others = processor_seconds() - worked - sum(os.times()[:4]) - bench.sink.cpu
    machine = f"{processors} processors, {platform.system()} on {platform.machine()}"
    versions = f"Python {platform.python_version()}, cryptography {cryptography.__version__}"
    share = max(0, others) / (time.perf_counter() - started) / processors
    print(f"\n{machine}, {versions}. Other programs took {share:.0%} of the processors meanwhile.")


if __name__ == "__main__":
    main(sys.argv[1:])
