"""Learning-rate schedules: constant, cosine and warmup-stable-decay (WSD), as functions of the step."""

import math

from configs.train import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Returns the learning rate of a step, counted from 0.

    The schedule is as long as `schedule.steps` says or, if that is not set, as the run of `steps` steps.
    Linear warmup reaches `peak` at step `warmup_steps - 1`. Then cosine (Loshchilov and Hutter 2017) falls to
    `peak * min_lr_ratio` at the schedule's last step, and WSD (Hu et al. 2024) stays at `peak` and falls there linearly
    over the last `decay_steps`.
    """
    floor, steps = peak * schedule.min_lr_ratio, schedule.steps or steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        progress = (step - schedule.warmup_steps + 1) / max(1, steps - schedule.warmup_steps)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "wsd" and step >= steps - schedule.decay_steps:
        return floor + (peak - floor) * (steps - 1 - step) / schedule.decay_steps
    return peak
