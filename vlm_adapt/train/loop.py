"""One stage of a run, step by step: count, run, update, record, save, evaluate.

Knows the order of things; each thing itself lives elsewhere. The loss is divided once, by the learned
tokens of the whole step over all ranks and microbatches.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlm_adapt import dist
from vlm_adapt.choices import nearest
from vlm_adapt.config.schema import Run
from vlm_adapt.data.problems import Account
from vlm_adapt.data.stream import Step
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.kinds import EVALUATIONS
from vlm_adapt.evaluate.progress import Told
from vlm_adapt.evaluate.scores import Scores
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.objectives import OBJECTIVES
from vlm_adapt.models.teacher import make_teacher
from vlm_adapt.train import checkpoint
from vlm_adapt.train.budget import Budget
from vlm_adapt.train.contract import Contract
from vlm_adapt.train.engine import Engine, Gradient
from vlm_adapt.train.feed import build_feed
from vlm_adapt.train.journal import Journal
from vlm_adapt.train.optim import rate_factor
from vlm_adapt.train.prepare import cache_features
from vlm_adapt.train.progress import Progress
from vlm_adapt.train.signals import Signals
from vlm_adapt.train.watch import watch


@dataclass
class Totals:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    samples: int = 0
    tokens: int = 0
    best: float | None = None
    account: dict[str, Any] = field(default_factory=lambda: Account().to_dict())


class StageLoop:
    """Trains one stage.

    Args:
        run: the whole run, saved with checkpoints; `stage_run` is the run of this stage.
        resume: state and folder of the checkpoint to go on from, when it is of this stage.
    """

    def __init__(
        self,
        run: Run,
        stage_name: str,
        stage_run: Run,
        assembled: AssembledModel,
        totals: Totals,
        journal: Journal,
        signals: Signals,
        resume: tuple[dict[str, Any], Path] | None,
    ):
        self.run, self.name, self.stage_run, self.assembled = run, stage_name, stage_run, assembled
        self.totals, self.journal, self.signals = totals, journal, signals
        self.output = Path(run.output_dir)
        train = stage_run.train
        if not stage_run.data.train:
            raise UserError(f"stage '{stage_name}' has nothing to train on: give data.train shards")
        feed = build_feed(assembled, run, stage_run, totals.stage)
        reader, self.stream, self.rows = feed.reader, feed.stream, feed.rows
        named = zip(reader.names, reader.selections, strict=True)
        self.selections = {name: kept for name, kept in named if kept is not None}
        self.total = train.max_steps or max(1, round(train.num_train_epochs * self.stream.steps_per_epoch))
        if assembled.objectives:
            assembled.model.objective = OBJECTIVES.check(train.objective)
            teacher = assembled.model.teacher = make_teacher(assembled, stage_run)  # type: ignore[arg-type]
            if teacher is not None:
                teacher.model.to(dist.device())
        if train.gradient_checkpointing:
            assembled.model.set_activation_checkpointing(True)
        assembled.prepare(reader, feed.plan, stage_run)
        self.begun = watch(assembled, feed) if resume is None else []
        assert assembled.plan is not None
        self.methods = [item.method for item in assembled.plan.attached if item.trains]
        groups = assembled.plan.groups(train.learning_rate)
        declared = [pair for _, _, pairs in groups for pair in pairs]
        self.contract = Contract(assembled.model, declared)
        self.engine = Engine(assembled.model, groups, train, assembled.dtype)
        self.contract.start()
        cache_features(assembled, train.cache_features, self.engine.stage)
        self.cursor = self.rows.start()
        # The main rank carries the account of the steps before; the others' is added at every save.
        before = Account.from_dict(totals.account)
        self.account = before if dist.is_main() else Account()
        lost = len(reader.problems)
        self.budget = Budget(stage_run.data, reader.names, before, lost, self.output)
        self.unread: list[tuple[str, str, str]] = []
        if resume is not None:
            state, folder = resume
            self.cursor = self.rows.resume(state["cursor"], self.stream.shape.global_batch)
            self.engine.load_moments(checkpoint.read_moments(folder), state["optimizer_step"])
            checkpoint.restore_random(folder, state, run.seed)
        else:
            torch.manual_seed(hash((run.seed, totals.stage, dist.rank())) % 2**63)
            self.unread = [(one.shard, one.key, one.reason) for one in reader.problems]
            if dist.is_main():
                self.account.lose_all(reader.problems)
        self.saved_at = -1
        self.scored: tuple[int, Scores] | None = None

    def train(self) -> bool:
        """Train to the stage's end.

        Returns:
            False when a signal asked to stop; the state is saved either way.
        """
        totals, train = self.totals, self.stage_run.train
        todo = self.total - totals.stage_step
        self.budget.write(totals.step, self.unread)
        progress = Progress(self.name, self.total, totals.stage_step, quiet=not dist.is_main())
        with progress:
            for step in self.stream.steps(self.cursor, todo):
                line, stop = self._step(step)
                progress.update(line)
                if totals.step % train.logging_steps == 0 or totals.stage_step == self.total:
                    self.journal.step(line)
                last = totals.stage_step == self.total
                # Scores come before the checkpoint, which then knows whether it is the best so far.
                due = train.eval_steps and (totals.step % train.eval_steps == 0 or last) and not stop
                better = self._evaluate(progress) if due else False
                if train.save_steps and totals.step % train.save_steps == 0 or better or stop or last:
                    self._save()
                if better:
                    name = f"checkpoint-{totals.step}"
                    checkpoint.on_main(partial(checkpoint.point_best, self.output, name), "the best pointer")
                if stop:
                    return False
        return True

    def _step(self, step: Step) -> tuple[dict[str, Any], bool]:
        totals, engine, train = self.totals, self.engine, self.stage_run.train
        started = time.perf_counter()
        # 1 count over all ranks and microbatches, once
        counts = [
            float(sum(batch.learned for batch in step.batches)),
            float(sum(batch.tokens for batch in step.batches)),
            float(sum(batch.places for batch in step.batches)),
            float(step.account.used),
            float(self.signals.asked),
        ]
        learned, tokens, places, used, stop, *by_source = dist.total(
            counts + self.budget.counts(step.account)
        )
        # 2 forward and backward, 3 update
        engine.module.train()
        loss_sum, norm = 0.0, 0.0
        for number, batch in enumerate(step.batches):
            last = number == len(step.batches) - 1
            part, _ = engine.forward_backward(batch.to(engine.device), learned)
            loss_sum += part
            factor = rate_factor(totals.stage_step, self.total, train)
            norm = engine.step(factor, last, partial(self._before_update, totals.stage_step)) or norm
        self.contract.after_step()
        for method in self.methods:
            method.after_step(totals.stage_step, self.total)
        # 4 account
        self.cursor = step.cursor
        loss = dist.total([loss_sum])[0] / max(1.0, learned)
        totals.step += 1
        totals.stage_step += 1
        totals.samples += int(used)
        totals.tokens += int(tokens)
        self.budget.add(by_source, step.account, totals.step)
        self.account.merge(step.account)
        self._check(loss, norm)
        seconds = time.perf_counter() - started + step.wait
        line = {
            "step": totals.step,
            "stage": self.name,
            "epoch": step.epoch,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": engine.rates(),
            "samples": totals.samples,
            "tokens": totals.tokens,
            "learned_tokens": int(learned),
            "useful_tokens": round(tokens / max(1.0, places), 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "memory": _memory(),
            "data_wait": round(step.wait, 4),
            "seconds": round(seconds, 4),
        }
        if len(self.budget.names) > 1:
            line["sources"] = self.budget.shares()
        return line, bool(stop)

    def _before_update(self, step: int, gradient: Gradient) -> None:
        for method in self.methods:
            method.before_step(step, self.total, gradient)

    def _check(self, loss: float, norm: float) -> None:
        """Stop a run that can come to nothing. Every rank sees the same numbers, so all stop together."""
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise UserError(
                    f"the {what} became {value} at step {self.totals.step}: lower the learning rate; "
                    f"checkpoints of earlier steps are in '{self.output}'"
                )
        if self.budget.total("used") == 0 and self.totals.stage_step == self.total:
            read = self.budget.total("read")
            self.budget.stop(f"{read} of {read} samples were refused, so nothing was learned")

    def _whole_account(self) -> Account:
        merged = Account()
        for part in dist.gather(self.account.to_dict()):
            merged.merge(Account.from_dict(part))
        return merged

    def _save(self) -> Path | None:
        if self.saved_at == self.totals.step:
            return None
        merged = self._whole_account()
        # The merged account becomes the main rank's own; the others start from nothing.
        self.account = merged if dist.is_main() else Account()
        self.totals.account = merged.to_dict()
        cursor = self.rows.state(dist.gather(self.cursor))
        state = asdict(self.totals) | {"cursor": cursor, "stage_name": self.name}
        keep = self.stage_run.train.save_total_limit
        folder = checkpoint.save(self.output, self.run, self.assembled, self.engine, state, keep)
        self.saved_at = self.totals.step
        self.journal.event("save", step=self.totals.step, checkpoint=folder.name)
        return folder

    def _evaluate(self, progress: Progress) -> bool:
        """Scores on held-out samples inside training; whether they are the best so far."""
        scores = self.score(self.stage_run.evaluate.limit)
        if scores is None:
            return False
        settings = self.stage_run.evaluate
        new, old = scores.value(settings.best_metric), self.totals.best
        if new is None:
            numbers = [name for name, value in scores.metrics.items() if isinstance(value, int | float)]
            raise UserError(
                f"evaluate.best_metric '{settings.best_metric}' is not among the scores"
                f"{nearest(settings.best_metric, numbers)}: there are {', '.join(numbers)}"
            )
        better = old is None or (new > old if settings.greater_is_better else new < old)
        better = better and not math.isnan(new)
        if better:
            self.totals.best = new
        progress.note(f"step {self.totals.step}: {scores.line()}")
        return better

    def score(self, limit: int | None) -> Scores | None:
        """Evaluate the model as it is; None when there is nothing held out."""
        if not self.stage_run.data.evaluate:
            return None
        if self.scored is not None and self.scored[0] == self.totals.step:
            known = self.scored[1]
            if limit is None and known.metrics["samples"] == known.metrics["samples_available"]:
                return known  # of these very weights, on every sample
        scores: Scores = EVALUATIONS.load(self.stage_run.model.kind)(
            self.assembled,
            self.stage_run.data,
            self.stage_run.evaluate,
            limit=limit,
            autocast=self.engine.autocast,
            device=self.engine.device,
            synced=dist.world_size() > 1,
            seed=self.run.seed,
            tell=Told(),
        )
        self.scored = (self.totals.step, scores)
        self.journal.event("evaluate", step=self.totals.step, metrics=scores.metrics)
        return scores


def _memory() -> int:
    """Peak bytes: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
