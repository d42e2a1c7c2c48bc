"""Turns: one at a time, and no purpose waits for all of another's."""

import threading

from openrlhf.serving.turns import ANSWERS, DOCUMENTS, PURPOSE, QUESTIONS, Turns
from tests.serving.served import until


def queue_up(turns: Turns, purposes: list[str]) -> list[str]:
    """The order in which threads that came in this order while the lock was held get it."""
    served, threads = [], []

    def take(purpose: str) -> None:
        PURPOSE.set(purpose)
        with turns:
            served.append(purpose)

    PURPOSE.set(QUESTIONS)
    with turns:
        for purpose in purposes:
            threads.append(threading.Thread(target=take, args=(purpose,), daemon=True))
            threads[-1].start()
            until(lambda: sum(map(len, turns._waiting.values())) == len(threads))
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return served


def test_purposes_are_served_in_turn_and_each_in_the_order_of_coming():
    order = queue_up(Turns(), [DOCUMENTS] * 3 + [QUESTIONS] * 2 + [ANSWERS] * 3)
    assert order == [DOCUMENTS, ANSWERS, QUESTIONS, DOCUMENTS, ANSWERS, QUESTIONS, DOCUMENTS, ANSWERS]


def test_one_thread_at_a_time_and_the_holder_may_enter_again():
    turns, inside, most = Turns(), 0, 0

    def work(number: int) -> None:
        nonlocal inside, most
        PURPOSE.set((ANSWERS, QUESTIONS, DOCUMENTS)[number % 3])
        for _ in range(50):
            with turns, turns:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most == 1
    assert not any(turns._waiting.values()) and not turns._holder
