"""What trackers get besides numbers: the learned rates as a map, and held-out tasks before and after adaptation.

Numbers go to every tracker that ``report_to`` names by the Trainer itself. Pictures have a call of their own in each.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from meta_peft.adapters.rate_map import RateMap
from meta_peft.errors import MetaPeftError
from meta_peft.utils.figures import new_figure
from meta_peft.utils.say_once import say_once

Pictures = Callable[[], dict[str, Any]]
"""Figures of matplotlib by name."""
MOST_CURVES = 100  # held-out tasks that get curves of their own


class PictureCallback(TrainerCallback):
    """Sends pictures to the trackers of a run, after every evaluation and with the last step, and curves of single tasks.

    Args:
        pictures: makes them; it is called only if there is a tracker that shows pictures.
        callbacks: all callbacks of the run, among which the trackers are.
        curves: numbers by name that the last evaluation found, too many for the log.
    """

    def __init__(
        self, pictures: Pictures, callbacks: Callable[[], list[Any]], curves: Callable[[], dict[str, float]] = dict
    ):
        self._pictures, self._callbacks, self._curves = pictures, callbacks, curves

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._send(state)
        if state.is_world_process_zero and (curves := self._curves()):
            for callback in self._callbacks():
                _count(callback, curves, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the end of training itself trackers are closed already."""
        if control.should_training_stop and not control.should_evaluate:
            self._send(state, only="inner_rates")

    def _send(self, state: Any, only: str = "") -> None:
        if not state.is_world_process_zero:
            return
        shows = [show for callback in self._callbacks() if (show := _shows(callback)) is not None]
        if not shows:
            return
        try:
            pictures = self._pictures()
        except MetaPeftError as error:  # no picture is worth a training
            say_once(f"Trackers get no pictures: {error}")
            return
        for name, figure in pictures.items():
            for show in shows if name.startswith(only) else ():
                show(name, figure, state.global_step)


def _shows(callback: Any) -> Callable[[str, Any, int], None] | None:
    """How a tracker's callback of `transformers` shows a figure, if it can and has begun."""
    kind = type(callback).__name__
    if kind == "TensorBoardCallback" and callback.tb_writer is not None:
        return lambda name, figure, step: callback.tb_writer.add_figure(name, figure, step, close=False)
    if kind == "WandbCallback" and callback._initialized:
        wandb = callback._wandb
        return lambda name, figure, step: wandb.log({name: wandb.Image(_pixels(figure)), "train/global_step": step})
    if kind == "TrackioCallback" and callback._initialized:
        trackio = callback._trackio
        return lambda name, figure, step: trackio.log({name: trackio.Image(_pixels(figure))}, step=step)
    return None


def _count(callback: Any, numbers: dict[str, float], step: int) -> None:
    """Send numbers to a tracker that has begun; nothing to other callbacks."""
    kind = type(callback).__name__
    if kind == "TensorBoardCallback" and callback.tb_writer is not None:
        for name, value in numbers.items():
            callback.tb_writer.add_scalar(name, value, step)
    elif kind == "WandbCallback" and callback._initialized:
        callback._wandb.log({**numbers, "train/global_step": step})
    elif kind == "TrackioCallback" and callback._initialized:
        callback._trackio.log(numbers, step=step)


def _pixels(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def rate_pictures(names: list[str], sizes: list[int], log_rates: torch.Tensor) -> dict[str, Any]:
    """The rates as figures (see `RateMap`), one for each inner step if each has rates of its own.

    Args:
        names: of the n fast weights.
        sizes: how many entries each has.
        log_rates: ``[S, n]``, or a column for each entry, whose geometric mean is shown.
    """
    if log_rates.shape[1] != len(names):
        log_rates = torch.stack([part.mean(1) for part in log_rates.split(sizes, dim=1)], dim=1)
    if len(log_rates) == 1:
        return {"inner_rates": RateMap.of(names, log_rates).figure()}
    return {f"inner_rates/step_{k + 1}": RateMap.of(names, row[None]).figure() for k, row in enumerate(log_rates)}


def task_curves(tasks: Sequence[str], before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Query losses of held-out tasks, ``[T]`` each, by names for a tracker; none, if they are more than it could show."""
    if len(tasks) > MOST_CURVES:
        return {}
    curves = {f"eval_tasks/{task}/loss_before": float(loss) for task, loss in zip(tasks, before, strict=True)}
    return curves | {f"eval_tasks/{task}/loss": float(loss) for task, loss in zip(tasks, after, strict=True)}


def adaptation_picture(before: np.ndarray, after: np.ndarray) -> Any:
    """Query losses of held-out tasks, ``[T]`` each: below the line, adaptation has helped."""
    figure = new_figure(4.5, 4.2)
    panel = figure.subplots()
    panel.scatter(before, after, s=14)
    most = float(max(before.max(), after.max()))
    panel.plot([0, most], [0, most], color="grey", linewidth=0.8)
    panel.set(xlabel="query loss before adaptation", ylabel="after")
    return figure


def peak_memory_gb() -> float:
    """The most memory that this process has had so far: on its GPU, or without one in all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class LossInProgressBar(ProgressCallback):
    """The Trainer's bar with the latest losses in it, before and after the inner steps, instead of a line for each log.

    It is quiet where standard error is no terminal.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)
        self.current_step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            before = f"{float(logs['loss_before']):.3f} -> " if "loss_before" in logs else ""
            self.training_bar.set_postfix_str(f"loss {before}{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)
