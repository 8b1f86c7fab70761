import math
import time

import torch

from crossways.training.watch import FiniteWatch, StepTimer

CPU = torch.device("cpu")


def test_the_first_loss_that_is_not_finite_is_kept():
    watch = FiniteWatch(CPU)
    assert watch.found() is None
    for step, loss in enumerate([1.0, 2.0, math.inf, math.nan, 3.0], start=1):
        watch.note(torch.tensor(loss, dtype=torch.bfloat16), step)
    assert watch.found() == (3, math.inf)


def test_nan_is_found_and_finite_losses_are_not():
    watch = FiniteWatch(CPU)
    watch.note(torch.tensor(1e30), 1)
    assert watch.found() is None
    watch.note(torch.tensor(math.nan), 2)
    step, loss = watch.found()
    assert step == 2
    assert math.isnan(loss)


def test_the_timer_gives_median_and_sum_and_starts_over():
    timer = StepTimer()
    assert timer.collect() == {}
    for seconds in (0.0, 0.0, 0.05):
        timer.start(CPU)
        time.sleep(seconds)
        timer.stop(CPU)
    times = timer.collect()
    assert times["interval_seconds"] >= 0.05
    assert times["step_seconds"] < 0.05
    assert timer.collect() == {}
