"""The server's certificate is known by its fingerprint: no clock has a say in who may connect."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from hostile_peers import start_worker

from cloudexec import BatchExecutor
from cloudexec._server.certificate import make_certificate
from cloudexec.testing import ManualLauncher

pytestmark = pytest.mark.timeout(60)

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long long offset(void) {
    const char *by = getenv("CLOCK_OFFSET");
    return by ? atoll(by) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += offset();
    return failed;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that moves the clock of a process by ``CLOCK_OFFSET`` seconds."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler here to move a process's clock with")
    directory = tmp_path_factory.mktemp("shim")
    (directory / "shim.c").write_text(SHIM)
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", "shim.so", "shim.c", "-ldl"]
    subprocess.run(words, cwd=directory, check=True, capture_output=True, timeout=30)
    return directory / "shim.so"


def test_a_certificate_is_valid_at_any_time() -> None:
    certificate = x509.load_pem_x509_certificate(make_certificate().pem)
    assert certificate.not_valid_before_utc.year <= 1950
    end = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
    assert certificate.not_valid_after_utc == end


def _year(_: int) -> int:
    """Return the year as a worker knows it; slowly enough for each to be asked."""
    time.sleep(0.3)
    return datetime.date.today().year


def test_workers_whose_clocks_are_wrong_connect(shim: Path) -> None:
    """By decades, in either direction; with what is enrolled goes on as usual."""
    years = {1970, 2050, 2099}
    now = datetime.datetime.now(datetime.UTC)
    launcher = ManualLauncher(needs_network=True)
    executor = BatchExecutor(len(years), launcher=launcher)
    futures = [executor.submit(_year, number) for number in years]
    workers = []
    try:
        for launch, year in zip(launcher.wait(len(years), 20), years, strict=True):
            there = datetime.datetime(year, 1, 2, tzinfo=datetime.UTC)
            offset = f"{(there - now).total_seconds():.0f}"
            changes = {"LD_PRELOAD": str(shim), "CLOCK_OFFSET": offset}
            workers.append(start_worker(launch.contact, launch.launch_id, **changes))
        seen = {future.result(30) for future in futures}
        while seen != years:  # one may have been faster than the others were there
            seen |= set(executor.map(_year, range(len(years)), timeout=30))
    finally:
        executor.kill_workers()
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(10)
            worker.kill()
            worker.communicate()
