"""Where an executor listens, and what it says if it cannot."""

from __future__ import annotations

import socket
import traceback

import pytest

from cloudexec import BatchExecutor, ConfigError, LaunchError
from cloudexec._server.dialed import Dialed


def test_a_port_that_is_taken_is_said_with_what_to_give_instead() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with BatchExecutor(1, listen=f"127.0.0.1:{port}") as executor:
            with pytest.raises(LaunchError) as caught:
                executor.submit(int)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: another program, or another executor, has port "
        f"{port}; give listen= another one, or 127.0.0.1:0 for any that is free"
    )
    printed = "".join(traceback.format_exception(caught.value))
    assert "GRPC_VERBOSITY" not in printed  # gRPC's own words do not help
    assert printed.count("  File ") == 2  # the caller's line, and the method that it calls


def test_an_address_that_another_machine_has_is_said_with_what_to_give_instead() -> None:
    with BatchExecutor(1, listen="192.0.2.1:0") as executor:  # of no machine: RFC 5737
        with pytest.raises(LaunchError) as caught:
            executor.submit(int)
    assert str(caught.value) == (
        "cannot listen on 192.0.2.1:0: this machine has no address 192.0.2.1; give listen= one of "
        "its own, or 0.0.0.0 for all of them, and advertise= what workers dial"
    )


def test_a_limit_for_tasks_is_called_what_the_executor_calls_it() -> None:
    """It is the ``timeout`` of ``with_options()``."""
    with pytest.raises(ConfigError, match=r"^task_timeout must be"):
        BatchExecutor(1, task_timeout=-1)
    with BatchExecutor(1) as executor, pytest.raises(ConfigError, match=r"^timeout must be"):
        executor.with_options(timeout=-1)


@pytest.mark.parametrize(
    ("target", "address", "is_own"),
    [
        ("127.0.0.1:5000", "127.0.0.1:5000", True),
        ("[::1]:5000", "[::1]:5000", True),
        ("192.0.2.1:5000", "0.0.0.0:5000", False),  # of no machine: RFC 5737
        ("192.0.2.1:5000", "192.0.2.1:5000", False),
        ("127.0.0.1:5000", "0.0.0.0:5000", False),  # workers elsewhere have a tunnel there
        ("127.0.0.2:5000", "127.0.0.1:5000", False),  # something else may listen there
        ("127.0.0.1:5001", "127.0.0.1:5000", False),
        ("localhost:5000", "127.0.0.1:5000", False),  # workers may know another one by the name
        ("nobody.invalid:5000", "0.0.0.0:5000", False),
    ],
)
def test_what_workers_dial_may_be_this_machine(target: str, address: str, is_own: bool) -> None:
    """If it is, a connection that is refused means that this process is gone."""
    assert Dialed(target, address).is_own is is_own


def test_an_address_of_this_machine_is_its_own_where_all_are_listened_on() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: the system chooses the own address
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no address but the loopback one")
    assert Dialed(f"{own}:5000", "0.0.0.0:5000").is_own
