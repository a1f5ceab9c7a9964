"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe_ds.adaptation import alarms
from dynmoe_ds.config.deepspeed_json import to_deepspeed
from dynmoe_ds.config.schema import DataConfig, ImageFolderConfig, LlavaDataConfig, RunConfig
from dynmoe_ds.config.validate import find_faults
from dynmoe_ds.data import BatchLoader, SlowExamples, TrainingOrder, from_rank_zero
from dynmoe_ds.distributed import StallClock, communication, raise_together
from dynmoe_ds.engine import initialize
from dynmoe_ds.engine.seam import init_distributed, runs_on_gpu
from dynmoe_ds.errors import ConfigError, DynMoEError, NonFiniteError
from dynmoe_ds.export import save_model
from dynmoe_ds.export.manifest import write_manifest
from dynmoe_ds.export.model import describe_model
from dynmoe_ds.models import count_flops, count_parameters, fuse_norms, parameter_groups
from dynmoe_ds.telemetry import Metric
from dynmoe_ds.telemetry.run_folder import MODEL_FILE
from dynmoe_ds.telemetry.run_owner import RunOwnership
from dynmoe_ds.telemetry.run_state import finished_steps
from dynmoe_ds.training.expert_loads import ExpertLoads
from dynmoe_ds.training.left_out import left_out_metrics, tell_left_out
from dynmoe_ds.training.observation import cost_metrics, kind_metrics, pool_metrics, rank_metrics, traffic_metrics
from dynmoe_ds.training.run_checkpoints import RunCheckpoints, clear_results, mark_finished
from dynmoe_ds.training.run_log import RunLog, on_first_rank
from dynmoe_ds.training.schedule import learning_rate
from dynmoe_ds.training.step_time import peak_memory_gib, reset_peak_memory, step_time_metrics
from dynmoe_ds.training.tasks import Task, build_task
from dynmoe_ds.training.trained_check import check_trained

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"

MAX_ROLL_BACKS = 3
"""Roll-backs of one process: what comes up more often is no accident, and each may cost `checkpoint.every_steps`."""


class Trainer:
    """One run from its configuration: `Trainer(config).run()` on every rank. What is learnt is `task`'s business.

    `stream` is where rank 0 shows its progress; None sends it to `logging`. `should_stop` is asked after every
    optimiser step: as soon as it is true on any rank, all stop with a checkpoint.
    Collective: construction and `run`. Raises, on every rank: ConfigError for a configuration that cannot work,
    LaunchError for a run folder that another process trains into, DataError for data that cannot be used.
    """

    def __init__(
        self, config: RunConfig, stream: TextIO | None = None, should_stop: Callable[[], bool] | None = None
    ) -> None:
        self.config = config
        self._should_stop = should_stop
        init_distributed(config.parallel.process_group_timeout_s)
        faults = find_faults(config, check_files=dist.get_rank() == 0)
        if dist.get_world_size() != config.parallel.num_ranks:
            faults.append(
                f"parallel.num_ranks is {config.parallel.num_ranks} but {dist.get_world_size()} ranks were started. "
                "Change one of the two."
            )
        raise_together(ConfigError(faults) if faults else None)
        self._ownership = RunOwnership(config.run_dir)
        self._find_finished()
        if not self.is_finished:
            while not from_rank_zero(self._ownership.try_take):
                pass
            try:
                self._find_finished()  # by the last moment of the owner before
                if not self.is_finished:
                    self._build(stream)
            except BaseException:
                self._ownership.release()
                raise

    def _find_finished(self) -> None:
        """Whether the folder holds this run's end already. Collective: every rank."""
        self.first_step = from_rank_zero(lambda: finished_steps(self.config.run_dir)) or 0
        self.is_finished = self.first_step >= self.config.training.steps

    def _build(self, stream: TextIO | None) -> None:
        """Everything that training needs. The run folder last: a run that is refused leaves it as it was."""
        config, timeout_s = self.config, self.config.parallel.process_group_timeout_s
        self.task = build_task(config)
        self.training_order = _training_order(config, self.task)
        model = self.task.build_model()
        self.parameter_count = count_parameters(model, config.parallel.ep_size)
        self.flop_count = count_flops(model, self.task.tokens_per_example)
        if runs_on_gpu():
            fuse_norms(model)
        self.engine = initialize(
            model=model,
            config=to_deepspeed(config),
            adaptation=config.adaptation,
            model_parameters=parameter_groups(model, config.optim.weight_decay),
            timeout_s=timeout_s,
            token_kinds=self.task.token_kinds,
            on_non_finite="skip_step" if config.training.on_non_finite == "skip_step" else "stop",
            dispatch=config.parallel.dispatch,
            adam=config.optim.implementation,
        )
        check_trained(model, self.engine.group_names(), None if config.stage is None else config.stage.trained)
        self.loader = BatchLoader(
            self.task.train,
            self.training_order,
            num_steps=config.training.steps,
            num_workers=_num_workers(config.data),
            device=self.engine.device,
        )
        self.checkpoints = RunCheckpoints(config.checkpoint, config.run_dir, self.engine)
        self.first_step = self.checkpoints.resume()
        self.run_log = RunLog(config, self.task, stream, self.first_step)
        # With it a checkpoint is a model, whether or not the run comes to its end.
        on_first_rank(lambda: write_manifest(describe_model(model), Path(config.run_dir) / MODEL_FILE))
        self._rolled_back: list[int] = []
        self.placements = self.engine.placements()
        self.stalls = StallClock(self.engine.device)
        self._start_interval()
        self._layers_warned_about: set[str] = set()

    def run(self) -> None:
        """Train, evaluate and log; at the end write model, sample and report. An interrupt keeps what was written.

        A step is logged every `log_every_steps` steps, whenever it is evaluated or saved, and at the end. A run that is
        resumed begins after the step of its latest checkpoint. One that has come to its end already is left alone.
        Collective: every rank. Raises: KeyboardInterrupt, after an orderly end; Preempted when it was asked to stop;
        NonFiniteError where `training.on_non_finite` says so, or cannot help any more.
        """
        steps, training = self.config.training.steps, self.config.training
        if self.is_finished:
            if dist.get_rank() == 0:
                logger.info(
                    "%s holds a run that has come to its end after %d steps: nothing to do. With more training.steps "
                    "it goes on from its latest checkpoint, if there is one; another run needs another run_dir.",
                    self.run_dir,
                    self.first_step,
                )
            self._ownership.release()
            return
        self._announce()
        self.engine.train()
        self.stalls.start()
        self._start_interval()
        done = self.first_step
        try:
            if training.on_non_finite == "roll_back" and not self.checkpoints.are_there():
                self.checkpoints.save()  # there must be somewhere to go back to
            while done < steps:
                try:
                    self._train_step(done)
                except NonFiniteError as error:
                    if training.on_non_finite != "roll_back":
                        raise
                    done = self._roll_back(done, error)
                    continue
                done += 1
                is_eval = done % training.eval_every_steps == 0 or done == steps
                is_stopping = self._is_any_rank_stopping() and done < steps
                is_saved = self.checkpoints.is_due(done) and not is_stopping
                # What is logged at a checkpoint need not be in it.
                is_log = is_eval or is_saved or is_stopping or done % training.log_every_steps == 0
                self._follow_experts(is_log)
                if is_log:
                    self._log(done, is_eval)
                if is_saved:
                    self.checkpoints.save()
                if is_stopping:
                    self.checkpoints.save_and_stop()
            self._finish()
        except KeyboardInterrupt:
            logger.warning("Interrupted after %d of %d steps. What was written is in %s.", done, steps, self.run_dir)
            raise
        except DynMoEError:
            # Every rank is there to end the save in the background, but for one whose own error is another: it is gone
            # soon, and with it a checkpoint that was not whole yet.
            self.checkpoints.settle_at_the_end()
            raise
        finally:
            self.stalls.stop()
            self.loader.close()
            self.run_log.close()
            self._ownership.release()

    def _finish(self) -> None:
        """Leave the trained model, a sample and the mark of a run that has come to its end. Collective: every rank."""
        self.checkpoints.settle()
        tell_left_out(self.task.left_out)
        on_first_rank(lambda: clear_results(self.run_dir, MODEL_FOLDER))
        if self.config.training.save_model:
            save_model(self.engine, Path(self.run_dir) / MODEL_FOLDER)
        text = self.task.sample(self.engine)
        if text is not None:
            self.run_log.sample(text)
        if dist.get_rank() == 0:
            mark_finished(self.run_dir, self.config.training.steps)

    @property
    def run_dir(self) -> str:
        """The folder that rank 0 writes."""
        return self.config.run_dir

    def _is_any_rank_stopping(self) -> bool:
        """Whether any rank was asked to stop. Collective if they can be: every rank, so that all stop at one step."""
        if self._should_stop is None:
            return False
        asked = torch.tensor(float(self._should_stop()), device=self.engine.device)
        if dist.get_world_size() > 1:
            with communication():
                dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def _train_step(self, step: int) -> None:
        """One optimiser step at the step's learning rate: every micro-batch forward and backward, then the update.

        Raises: NonFiniteError on every rank, with nothing updated.
        """
        if self.config.training.on_non_finite == "roll_back":
            self.engine.on_non_finite = "skip_step" if step in self._rolled_back else "stop"
        self.engine.set_lr(self._learning_rate(step))
        num_left_out = self.engine.skipped_steps
        losses = torch.zeros(2, device=self.engine.device)
        for micro_step in range(self.config.training.gradient_accumulation_steps):
            batch = self._batch(step, micro_step)
            loss = self.engine(**batch).loss
            self.engine.backward(loss)
            self.engine.step()  # updates the weights after the last micro-batch
            losses += torch.stack([loss.detach().float(), self.engine.last_aux_loss.float()])
        is_left_out = self.engine.skipped_steps > num_left_out
        self.interval.add(None if is_left_out else losses / self.config.training.gradient_accumulation_steps)

    def _batch(self, step: int, micro_step: int) -> dict[str, Tensor]:
        """This rank's batch. Collective for examples that are read when it is their turn: every rank.

        Raises: DataError for such an example that cannot be used, or DivergenceError that quotes another rank's.
        """
        batch: dict[str, Tensor] = {}
        error: Exception | None = None
        try:
            with self.stalls.stall("data"):
                batch = self.loader.batch(step, micro_step)
        except Exception as e:  # whatever it is, the other ranks must not wait for this one
            error = e
        if isinstance(self.task.train, SlowExamples):
            with communication():
                raise_together(error, self.engine.host_group)
        elif error is not None:
            raise error
        return batch

    def _roll_back(self, step: int, error: NonFiniteError) -> int:
        """Go back to the latest checkpoint after `step`, from 0, was not finite; the steps that are done then.

        What is replayed is the same bit for bit. If the step is not finite again, its update is left out: the fault is
        in its data. If it is, the fault was the machine's, and the step is taken.
        Collective: every rank. Raises: `error` after MAX_ROLL_BACKS; CheckpointError if there is nothing to go back to.
        """
        if len(self._rolled_back) >= MAX_ROLL_BACKS:
            raise NonFiniteError(f"{error} The run was rolled back {MAX_ROLL_BACKS} times already.") from error
        self._rolled_back.append(step)
        path = self.checkpoints.go_back()
        done = self.engine.global_steps
        self.run_log.rewind(done)
        self.engine.take_traffic()  # of steps that are done again
        self._start_interval()
        if dist.get_rank() == 0:
            logger.warning(
                "%s Going back to %s, roll-back %d of %d.", error, path, len(self._rolled_back), MAX_ROLL_BACKS
            )
        return done

    def _follow_experts(self, is_log: bool) -> None:
        """Record adaptations and the experts' loads."""
        events = self.engine.take_events()
        if events or is_log:
            for placements, records in self.engine.take_records_by_placement():
                self.interval.loads.add(records, placements)
            self.placements = self.engine.placements()
        self.run_log.events(events)

    def _log(self, done: int, is_eval: bool) -> None:
        """Log the steps since the last log. Evaluation comes after the clock is read, and belongs to no interval."""
        loads = self.interval.loads
        metrics = self._training_metrics(done) + self._routing_metrics("moe", loads)
        # Reading the values of controllers waits for the device.
        metrics += pool_metrics(self.placements, self.engine.observables() if self._is_detailed else {})
        metrics += rank_metrics(loads)
        metrics += traffic_metrics(self.engine.take_traffic(), self.interval.num_steps * self._tokens_per_step())
        if is_eval:
            metrics += self._evaluate()
        self.run_log.log(done, metrics)
        self.run_log.experts(done, loads.line(self.placements))
        self._warn_about(loads)
        self._start_interval()

    def _start_interval(self) -> None:
        """From here on steps are counted for the next log line."""
        self.stalls.take()
        reset_peak_memory(self.engine.device)
        self.interval = _Interval.starting_now(self.engine.device)

    def _training_metrics(self, done: int) -> list[Metric]:
        losses = self.interval.mean_losses()  # waits for the device, so the clock is read after it
        elapsed_s = time.perf_counter() - self.interval.started_s
        num_steps, tokens_per_step = self.interval.num_steps, self._tokens_per_step()
        names = ("train/loss", "train/aux_loss")
        metrics = [
            *(Metric(name=name, value=value, reduction="mean") for name, value in zip(names, losses, strict=False)),
            Metric(name="train/learning_rate", value=self._learning_rate(done - 1), reduction="last"),
            Metric(name="train/tokens_per_second", value=num_steps * tokens_per_step / elapsed_s, reduction="sum"),
            Metric(name="train/tokens_seen", value=done * tokens_per_step, reduction="sum"),
            Metric(name="train/peak_memory_gib", value=peak_memory_gib(self.engine.device), reduction="max"),
            *step_time_metrics(
                elapsed_s, num_steps, self.stalls.take(), self.engine.device, per_rank=self._is_detailed
            ),
        ]
        if self.config.training.on_non_finite != "stop":
            metrics.append(Metric(name="train/skipped_steps", value=self.engine.skipped_steps, reduction="last"))
        metrics += left_out_metrics(self.task.left_out)
        norm = self.engine.gradient_norm()
        return metrics if norm is None else [*metrics, Metric(name="train/gradient_norm", value=norm, reduction="last")]

    @property
    def _is_detailed(self) -> bool:
        """Whether what costs a little is measured, too."""
        return self.config.telemetry.detail == "detailed"

    def _tokens_per_step(self) -> int:
        """Training tokens of this rank per optimiser step."""
        training = self.config.training
        return training.micro_batch_size * training.gradient_accumulation_steps * self.task.tokens_per_example

    def _evaluate(self) -> list[Metric]:
        """What the task measures on the held-out data, and how their tokens are routed."""
        with self.engine.evaluation_ledger() as ledger:
            values = self.task.evaluate(self.engine)
        loads = ExpertLoads()
        loads.add(self.engine.sum_over_ranks(ledger.records()), self.placements)
        metrics = [Metric(name=name, value=value, reduction="last") for name, value in values.items()]
        return metrics + self._routing_metrics("eval", loads)

    def _routing_metrics(self, group: str, loads: ExpertLoads) -> list[Metric]:
        """How the tokens of these loads were routed and what they cost."""
        return [
            *loads.metrics(group),
            *kind_metrics(group, loads, self.engine.token_kinds),
            *cost_metrics(group, loads, self.placements, self.parameter_count, self.flop_count),
        ]

    def _learning_rate(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(
            step,
            peak=optim.lr,
            warmup_steps=optim.warmup_steps,
            total_steps=self.config.training.steps,
            final_fraction=optim.final_lr_fraction,
            decay=optim.lr_decay,
        )

    def _warn_about(self, loads: ExpertLoads) -> None:
        """Log what is wrong with a layer's routing after warm-up, once per layer: what stays must not bury the log."""
        if self.engine.global_steps <= self.config.optim.warmup_steps:
            return
        for layer, records in loads.records.items():
            found = alarms(layer, records, num_live=len(self.placements[layer].live_ids))
            if found and layer not in self._layers_warned_about and dist.get_rank() == 0:
                self._layers_warned_about.add(layer)
                logger.warning(" ".join(found))

    def _announce(self) -> None:
        """Say on rank 0 what is about to be trained on what."""
        if dist.get_rank() != 0:
            return
        count, order = self.parameter_count, self.training_order
        logger.info("%.2fM parameters with live experts, %.2fM with every slot", count.live / 1e6, count.in_slots / 1e6)
        logger.info(
            "%d training sequences of %d tokens, %d per step on %d ranks: %.2f epochs",
            order.num_sequences,
            self.task.tokens_per_example,
            order.global_batch_size,
            order.world_size,
            self.config.training.steps * order.global_batch_size / order.num_sequences,
        )
        wanted = self.config.training.eval_sequences
        if wanted is not None and wanted > self.task.num_held_out:
            logger.warning(
                "training.eval_sequences is %d but the held-out part has %d sequences: all of them are used.",
                wanted,
                self.task.num_held_out,
            )


def _training_order(config: RunConfig, task: Task) -> TrainingOrder:
    """The order in which this rank reads the training examples."""
    return TrainingOrder(
        seed=config.seed,
        num_sequences=len(task.train),
        micro_batch_size=config.training.micro_batch_size,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        grouping=task.grouping,
    )


def _num_workers(data: DataConfig) -> int:
    """Of each rank; other data than images are in memory already."""
    return data.num_workers if isinstance(data, LlavaDataConfig | ImageFolderConfig) else 0


@dataclass(kw_only=True, slots=True)
class _Interval:
    """The steps since the last log. losses [2]: sums over updates of the loss and the auxiliary loss.

    num_steps: all of them; num_updates: those whose update was not left out.
    """

    started_s: float
    losses: Tensor
    num_steps: int = 0
    num_updates: int = 0
    loads: ExpertLoads = field(default_factory=ExpertLoads)

    @classmethod
    def starting_now(cls, device: torch.device) -> _Interval:
        return cls(started_s=time.perf_counter(), losses=torch.zeros(2, device=device))

    def add(self, losses: Tensor | None) -> None:
        """Count one step without waiting for the device; None for the losses [2] of one that was left out."""
        self.num_steps += 1
        if losses is not None:
            self.num_updates += 1
            self.losses += losses

    def mean_losses(self) -> list[float]:
        """The mean loss and auxiliary loss per update; empty if none was made."""
        return (self.losses / self.num_updates).tolist() if self.num_updates else []
