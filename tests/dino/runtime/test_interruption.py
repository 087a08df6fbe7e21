import os
import signal
import subprocess
import sys
import threading

import pytest

from dino.runtime.interruption import Interruption

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_by_name_and_ends_nothing(number):
    with Interruption() as interruption:
        assert interruption.signal_name == ""
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert interruption.signal_name == number.name


def test_the_first_signal_is_the_reason():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    assert interruption.signal_name == "SIGUSR1"


def test_handlers_of_before_are_back_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError), Interruption():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
        raise ValueError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_it_waits_for_nothing():
    found = []

    def run():
        with Interruption() as interruption:
            found.append(interruption.signal_name)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [""]


_WORKER = """
import os, signal, sys
from dino.runtime.interruption import outlive_interruption
outlive_interruption()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
print("alive")
"""


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        (["SIGTERM", "SIGUSR1", "SIGUSR1", "SIGUSR2", "SIGUSR2"], 0),
        (["SIGTERM", "SIGTERM"], -signal.SIGTERM),  # its loader insists
    ],
)
def test_a_loading_process_outlives_what_ends_the_run(signals, code):
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, *signals], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert done.returncode == code
    assert (done.stdout == "alive\n") == (code == 0)
