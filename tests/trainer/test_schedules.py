"""Learning rates as written by a run, against the formulas."""

from math import cos, pi

import pytest

from tests.trainer.launch import flags, train_many

STEPS, WARM_UP, HIGHEST = 10, 2, 0.004
SHAPES = {
    "cosine_with_min_lr": lambda done: 0.1 + 0.9 * (1 + cos(pi * done)) / 2,
    "cosine": lambda done: (1 + cos(pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant_with_warmup": lambda done: 1.0,
    "constant": None,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Ten steps, two of which warm up, under each schedule."""
    folder = tmp_path_factory.mktemp("schedules")
    options = {"max_samples": 5, "train_batch_size": 1, "micro_train_batch_size": 1, "max_epochs": 2}
    options.update(learning_rate=HIGHEST, lr_warmup_ratio=0.25)  # of ten steps two: rounded down
    lines = {name: flags(folder / name, lr_scheduler=name, **options) for name in SHAPES}
    return train_many({name: (folder / name, line) for name, line in lines.items()})


@pytest.mark.parametrize("name", SHAPES)
def test_learning_rates_follow_the_schedule(runs, name):
    rates = []
    for step in range(STEPS):
        if SHAPES[name] is None:
            rates.append(HIGHEST)
        elif step < WARM_UP:
            rates.append(HIGHEST * step / WARM_UP)
        else:
            rates.append(HIGHEST * SHAPES[name]((step - WARM_UP) / (STEPS - WARM_UP)))
    assert runs[name].curve("learning_rate") == pytest.approx(rates)


def test_the_default_schedule_never_falls_below_a_tenth(runs):
    rates = runs["cosine_with_min_lr"].curve("learning_rate")[WARM_UP:]
    assert min(rates) >= HIGHEST / 10 and rates == sorted(rates, reverse=True)
    assert min(runs["cosine"].curve("learning_rate")[WARM_UP:]) < HIGHEST / 10
