"""Ctrl-C while an answer is made: noted, then raised where it can be."""

import os
import signal
import threading

import pytest

from deepzoo.zoo.cli import guarded
from deepzoo.zoo.cli.interrupt import Held, is_interrupt


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def made_of(cause: BaseException) -> SystemError:
    error = SystemError("<function f at 0x7f> returned a result with an exception set")
    error.__cause__ = cause
    return error


def test_the_first_press_waits_for_the_check():
    with Held() as held:
        held.check()
        press()
        with pytest.raises(KeyboardInterrupt):
            held.check()
        held.check()  # once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_press_behind_the_last_check_is_not_lost():
    with pytest.raises(KeyboardInterrupt), Held() as held:
        held.check()
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_press_does_not_wait():
    with pytest.raises(KeyboardInterrupt), Held():
        press()
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_or_foreign_handler_stays():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Held() as held:
            press()
            held.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing():
    found: list[object] = []

    def run() -> None:
        with Held() as held:
            found.append(signal.getsignal(signal.SIGINT))
            held.check()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_what_c_code_makes_of_ctrl_c_is_ctrl_c(capsys: pytest.CaptureFixture[str]):
    assert is_interrupt(KeyboardInterrupt())
    assert is_interrupt(made_of(KeyboardInterrupt()))
    assert not is_interrupt(made_of(ValueError()))
    assert not is_interrupt(SystemError("other"))

    def fail(error: BaseException) -> int:
        raise error

    assert guarded(lambda: fail(made_of(KeyboardInterrupt()))) == 130
    assert capsys.readouterr().err == "deepzoo: interrupted\n"
    assert guarded(lambda: fail(SystemError("other"))) == 1
