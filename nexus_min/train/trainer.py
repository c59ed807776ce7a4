"""Training: one loop for every stage of the paper, over any configuration.

A stage brings modules and the loss of a batch (`stage.Stage`). The loop adds what all stages share:
Muon on the hidden matrices and AdamW on the rest, warm-up / constant / linear decay, an exponential
moving average of the weights, metrics, sample grids, checkpoints and resume.

Losses: `autoregressive.ar_loss` of the AR model (paper section 3.2, lambdas 3, 1.5, 1.5) and
`flow.rf_loss` of both decoders (official `train_generation_decoder` / `train_editing_decoder`).
"""

import json
from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .checkpoint import Checkpoint, append_line, deferred_interrupt
from .optim import flat_gradient, make_optimizers
from .stage import WARMUP, Clock, Run, Schedule, Stage, changes, make_rng, mixed_precision

REPORT = 50  # steps whose metrics are averaged into one line
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def fit(stage: Stage, run: Run) -> dict:
    """Train `stage` for its budget, leave the averaged weights in its modules, return a summary.

    Resumes from `run.folder/<stage>.ckpt`. Writes metrics.jsonl and, through `stage.sample`,
    <stage>_NNNNNN.png. Raises FloatingPointError when a loss, gradient or weight is not finite,
    and KeyboardInterrupt after Ctrl-C, when the step under way is saved.
    """
    state = TrainState(stage, run)
    schedule, run = state.schedule, state.run
    if schedule.finished:
        print(f"{stage.name} is finished ({schedule.step} steps); more --steps or --minutes go on")
        return state.summary()
    saved = sampled = schedule.elapsed
    clock = Clock(schedule.elapsed)
    bar = {"desc": stage.name, "initial": schedule.progress, "total": 1.0, "bar_format": BAR}
    bar = tqdm(**bar, smoothing=0, disable=run.quiet)
    with deferred_interrupt() as interrupt, bar, state.checkpoint.mention():
        for step in schedule:
            # A batch and its loss. The generator of the step makes both data and noise.
            rng = make_rng(run.seed, stage.name, step)
            with mixed_precision(run.bf16):
                loss, metrics = stage.loss(rng, schedule.progress)

            # The gradient, in one flat buffer, clipped to norm 1.
            state.gradient.zero_()
            loss.backward()
            norm = state.gradient.norm()
            metrics = {"loss": loss, **metrics, "grad_norm": norm}
            metrics = {name: float(torch.as_tensor(x).detach()) for name, x in metrics.items()}
            if not (np.isfinite(metrics["loss"]) and norm.isfinite()):
                state.raise_nonfinite("the loss or its gradient", metrics)
            state.gradient *= (1.0 / (norm + 1e-6)).clamp_max(1.0)

            # One step of Muon and AdamW.
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:  # `defaults` holds the stage's rate
                    group["lr"] = optimizer.defaults["lr"] * schedule.lr_scale
                optimizer.step()

            # The average of the weights (EMA), over fewer steps at first.
            decay = min(stage.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(state.average, state.weights, 1.0 - decay)

            # Log, save, sample.
            schedule.tick(clock())
            stop = interrupt.heard
            state.window.append(metrics)
            bar.update(schedule.progress - bar.n)
            if schedule.step % REPORT == 0 or schedule.finished or stop:
                bar.set_postfix_str(state.report())
            if schedule.finished:
                break
            if stop or schedule.elapsed - saved > run.save_every:
                saved = schedule.elapsed
                state.save()
            if stop:
                raise KeyboardInterrupt
            if schedule.elapsed - sampled > run.sample_every:
                sampled = schedule.elapsed
                state.sample(f"{schedule.step:06d}")
        if run.steps is None and schedule.step < WARMUP:
            done = f"{schedule.step} steps in {schedule.elapsed:.0f} s, fewer than its warm-up"
            raise ValueError(f"stage {stage.name}: {done} of {WARMUP}; give more --minutes")
        torch._foreach_copy_(state.weights, state.average)
        state.save()
        state.sample("final")
    if interrupt.heard:
        raise KeyboardInterrupt
    return state.summary()


class TrainState:
    """What the next step depends on, which is what a checkpoint holds; and the log."""

    def __init__(self, stage: Stage, run: Run):
        self.checkpoint = Checkpoint(run.folder / f"{stage.name}.ckpt")
        saved = self.checkpoint.load()
        self.stage, self.run = stage, run
        parameters = [p for p in stage.modules.parameters() if p.requires_grad]
        self.weights = [p.detach() for p in parameters]  # share memory with the parameters
        self.average = [w.clone() for w in self.weights]
        self.gradient = flat_gradient(parameters)
        self.optimizers = make_optimizers(stage)
        seconds = None if run.seconds is None else max(1.0, run.seconds - run.elapsed_before)
        self.schedule = Schedule(seconds, run.steps)
        run.folder.mkdir(parents=True, exist_ok=True)
        self.metrics: dict[str, float] = {}  # the latest of each name
        self.changed: list[str] = []  # settings, by a command that went on
        self.window: list[dict[str, float]] = []  # of the steps since the last report
        if saved is not None:
            self.restore(saved)

    def state(self) -> dict:
        """What `restore` needs: weights, average, optimizers, schedule."""
        return {
            "modules": self.stage.modules.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedule": self.schedule.state(),
            "bf16": self.run.bf16,
            "metrics": self.metrics,
            "settings": self.run.settings,
            "changed": self.changed,
        }

    def restore(self, state: dict) -> None:
        """Resume from `state`, in place."""
        try:
            self.stage.modules.load_state_dict(state["modules"])
            torch._foreach_copy_(self.average, state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            before, now = state.get("settings", {}), self.run.settings
            changed = changes(before, now)
            is_extended = any(before.get(name) != now.get(name) for name in ("steps", "minutes"))
            self.schedule.restore(state["schedule"], is_extended)
            self.metrics, self.changed = state["metrics"], state.get("changed", [])
            self.run = replace(self.run, bf16=state["bf16"])  # a run keeps its precision
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            path = self.checkpoint.path
            raise ValueError(f"{path}: does not fit this stage ({reason})") from None
        if changed:
            self.changed = [*self.changed, f"step {self.schedule.step}: {changed}"]
            print(f"{self.stage.name} goes on from step {self.schedule.step}; {changed}")

    def save(self) -> None:
        """Write a checkpoint; weights that are not finite go into a dump instead."""
        if not nn.utils.get_total_norm(self.weights + self.average, foreach=True).isfinite():
            self.raise_nonfinite("a weight", {})
        self.checkpoint.save(self.state())

    def raise_nonfinite(self, what: str, metrics: dict[str, float]) -> NoReturn:
        """Dump the state that led to a number that is not finite; FloatingPointError with the step.

        Renamed to the checkpoint, the dump leads to the same step again. Its `gradients` names the
        parameters whose gradient is not finite.
        """
        named = self.stage.modules.named_parameters()
        broken = [k for k, p in named if p.grad is not None and not p.grad.isfinite().all()]
        batch = (self.run.seed, self.stage.name, self.schedule.step, 0)
        lines = sorted(set(self.stage.lines))
        facts = {"batch": batch, "lines": lines, "numbers": metrics, "gradients": broken}
        status, path = self.checkpoint.status, self.checkpoint.path
        dump = path.with_stem(f"{path.stem}.nonfinite-0")
        try:
            Checkpoint(dump).save(self.state() | {"nonfinite": facts})
            dump_status = f"the state before it is in {dump}"
        except OSError as error:
            dump_status = str(error).split(";")[0]
        sources = f", of {', '.join(lines)}" if lines else ""
        raise FloatingPointError(
            f"stage {self.stage.name}, step {self.schedule.step}: {what} is not finite ({metrics}; "
            f"batch of seed, stage, step, rank {batch}{sources}); {status}, {dump_status}"
        )

    def report(self) -> str:
        """Log the mean of the metrics since the last report; the text beside the progress bar."""
        mean = {k: float(np.mean([w[k] for w in self.window])) for k in self.window[0]}
        self.window = []
        self.log({"lr_scale": self.schedule.lr_scale} | mean)
        rate = self.schedule.step / max(self.schedule.elapsed, 1e-9)
        return f"{rate:.1f} step/s, loss {mean['loss']:.4f}"

    def sample(self, tag: str) -> None:
        """Sample a grid of images by the average, and log what it measures."""
        if self.stage.sample is None:
            return
        weights = [w.clone() for w in self.weights]
        torch._foreach_copy_(self.weights, self.average)
        self.log(self.stage.sample(self.run.folder / f"{self.stage.name}_{tag}.png"))
        torch._foreach_copy_(self.weights, weights)

    def log(self, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl."""
        metrics = {k: round(float(v), 5) for k, v in metrics.items()}
        self.metrics |= metrics
        seconds = round(self.schedule.elapsed, 1)
        line = {"stage": self.stage.name, "step": self.schedule.step, "seconds": seconds} | metrics
        append_line(self.run.folder / "metrics.jsonl", json.dumps(line))

    def summary(self) -> dict:
        seconds = self.schedule.elapsed + self.run.elapsed_before
        name, steps = self.stage.name, self.schedule.step
        summary = {"stage": name, "steps": steps, "seconds": seconds, "metrics": self.metrics}
        return summary | ({"changed": self.changed} if self.changed else {})
