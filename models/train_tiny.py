"""Trains the model of `dsopt.models.tiny` from nothing: python -m dsopt.models.train_tiny

Float32, AdamW, a cosine schedule behind a warm-up. As in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) experts are
balanced without a loss of their own: after each step the correction bias of every router moves by

    bias += bias_speed * sign(mean(load) - load)

where load counts the tokens that chose each expert; here the speed falls with the learning rate. An interrupted run
goes on where it was saved last: what a step sees depends on its number alone. It may go on with another number of steps
in all; the learning rate then follows the new schedule, and the log says from which step.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsopt import machine
from dsopt.bench import accuracy
from dsopt.files import replaced, write_text
from dsopt.models import presets, tiny

RESUME = "resume.pt"


@dataclass(frozen=True)
class Settings:
    """What a run is; another run of the same settings on the same text sees the same batches."""

    steps: int = 3600
    batch: int = 2
    context: int = 512
    lr: float = 2e-3
    last_lr: float = 0.05  # of lr, at the end
    warmup: int = 200
    weight_decay: float = 0.1
    bias_speed: float = 0.03  # falls as the learning rate does
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.last_lr + (1 - self.last_lr) * (1 + math.cos(math.pi * done)) / 2)


class Balance:
    """Counts the tokens each expert of a model gets, and moves the routers' correction bias against it."""

    def __init__(self, model: torch.nn.Module):
        self.routers = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
        self.loads = [torch.zeros_like(router.e_score_correction_bias) for router in self.routers]
        for router, load in zip(self.routers, self.loads):
            router.register_forward_hook(partial(_count, load))

    def update(self, speed: float) -> float:
        """Moves every bias by `speed` and forgets the loads; returns the largest load over the mean."""
        worst = 0.0
        for router, load in zip(self.routers, self.loads):
            router.e_score_correction_bias += speed * (load.mean() - load).sign()
            worst = max(worst, (load.max() / load.mean()).item())
            load.zero_()
        return worst


def _count(load: torch.Tensor, router: torch.nn.Module, args: Any, out: tuple[torch.Tensor, ...]) -> None:
    """Adds to `load` how many tokens chose each expert in a router's results: logits, weights, indices."""
    load += torch.bincount(out[2].flatten(), minlength=load.numel())


class Run:
    """A model in training: `step` makes one step, `save` and `resume` keep and take up all there is to a run."""

    def __init__(self, settings: Settings, train: tiny.Text, config: dict[str, Any]):
        from transformers import AutoModelForCausalLM

        self.settings, self.train = settings, train
        torch.manual_seed(settings.seed)
        self.model = AutoModelForCausalLM.from_config(presets.config(config), dtype=torch.float32).train()
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("grouped_mm")
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
        self.balance = Balance(self.model)
        self.done = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []
        # [step, steps]: from that step on the schedule was one of so many steps
        self.schedules = [[0, settings.steps]]

    def batch(self, step: int) -> torch.Tensor:
        """Rows of context + 1 tokens, from places that the step's number decides."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        last = self.train.tokens.numel() - settings.context
        starts = torch.randint(last, (settings.batch, 1), generator=generator)
        return self.train.tokens[starts + torch.arange(settings.context + 1)].long()

    def step(self) -> tuple[float, float]:
        """One step; returns its loss and the largest load of an expert over the mean."""
        started = time.perf_counter()
        rows = self.batch(self.done)
        logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        lr = self.settings.lr_at(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        worst = self.balance.update(self.settings.bias_speed * lr / self.settings.lr)
        self.done += 1
        self.seconds += time.perf_counter() - started
        return loss.item(), worst

    def _identity(self) -> dict[str, Any]:
        return {"settings": dataclasses.asdict(self.settings), "train_sha256": self.train.sha256}

    def save(self, folder: Path) -> None:
        """Writes the state of the run into the folder: whole or not at all."""
        state = {
            **self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
            "log": self.log,
            "schedules": self.schedules,
        }
        with replaced(folder / RESUME) as temporary:
            torch.save(state, temporary)

    def resume(self, folder: Path) -> bool:
        """Takes up the run in the folder, if there is one.

        Raises ValueError where it is one of another text or of other settings, the number of steps aside.
        """
        if not (folder / RESUME).is_file():
            return False
        state = torch.load(folder / RESUME, weights_only=True)
        steps = self.settings.steps
        for name, value in self._identity().items():
            was = {**state[name], "steps": steps} if name == "settings" else state[name]
            if was != value:
                raise ValueError(f"{folder / RESUME} is of a run with {name} {was}, not {value}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.seconds, self.log = state["done"], state["seconds"], state["log"]
        self.schedules = state["schedules"]
        if self.schedules[-1][1] != steps:
            self.schedules.append([self.done, steps])
        return True

    def publish(self, folder: Path) -> None:
        """Writes the model in bfloat16 in transformers' layout, with its configs; routers' biases stay float32."""
        model = copy.deepcopy(self.model)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        model.save_pretrained(folder)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint; an interrupted run goes on there.")],
    steps: Annotated[int, typer.Option(min=1)] = Settings.steps,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = Settings.lr,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = Settings.batch,
    context: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = Settings.context,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, instead of PyTorch's choice.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two saves.")] = 100,
) -> None:
    """Train the small model on the source of Python's standard library."""
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    heldout = tiny.text(tiny.HELDOUT)
    run = Run(
        Settings(steps=steps, lr=lr, batch=batch, context=context), tiny.text(tiny.MODULES), tiny.CONFIG
    )
    out.mkdir(parents=True, exist_ok=True)
    try:
        if run.resume(out):
            console.print(f"going on behind step {run.done}", highlight=False)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="OUT") from error
    interrupted = _train(run, out, save_every, console)
    if interrupted:
        console.print(
            f"interrupted; the same command goes on behind step {run.done // save_every * save_every}",
            highlight=False,
        )
        raise typer.Exit(130)
    run.publish(out)
    run.model.eval()
    found = accuracy.predict(run.model, heldout.tokens).loss
    write_text(out / "training.json", json.dumps(_record(run, heldout, found), indent=1) + "\n")
    (out / RESUME).unlink(missing_ok=True)
    console.print(f"held-out loss {found:.4f} nats a byte, perplexity {math.exp(found):.4f}", highlight=False)


def _train(run: Run, out: Path, save_every: int, console: Console) -> bool:
    """All steps that are left; True where Ctrl-C ended them early."""
    tokens = run.settings.batch * run.settings.context
    columns = (
        TextColumn("loss {task.fields[loss]:.3f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    smooth = run.log[-1]["loss"] if run.log else math.log(256)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=run.settings.steps, completed=run.done, loss=smooth, rate=0.0)
        try:
            while run.done < run.settings.steps:
                loss, worst = run.step()
                smooth += (loss - smooth) * max(0.02, 1 / run.done)
                rate = run.done * tokens / run.seconds
                progress.update(task, completed=run.done, loss=smooth, rate=rate)
                if run.done % save_every == 0 or run.done == run.settings.steps:
                    entry = {"step": run.done, "loss": round(smooth, 4), "load": round(worst, 2)}
                    run.log.append({**entry, "seconds": round(run.seconds, 1)})
                    run.save(out)
                    if not console.is_terminal:
                        console.print(entry, f"{rate:.0f} tokens/s", highlight=False)
        except KeyboardInterrupt:
            return True  # perhaps within a step, so what counts is the last save
    return False


def _record(run: Run, heldout: tiny.Text, found: float) -> dict[str, Any]:
    """The log of a run: what was trained on what, how, and how well."""
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "settings": dataclasses.asdict(run.settings),
        "schedules": run.schedules,
        "tokens": run.done * run.settings.batch * run.settings.context,
        "seconds": round(run.seconds, 1),
        "threads": torch.get_num_threads(),
        "text": {
            "bytes": run.train.tokens.numel(),
            "sha256": run.train.sha256,
            "files": len(run.train.files),
        },
        "heldout": {
            "bytes": heldout.tokens.numel(),
            "sha256": heldout.sha256,
            "files": list(heldout.files),
            "loss": round(found, 5),
            "perplexity": round(math.exp(found), 5),
        },
        "machine": machine.describe(),
        "log": run.log,
    }


if __name__ == "__main__":
    typer.run(main)
