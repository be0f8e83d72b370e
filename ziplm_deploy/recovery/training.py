"""Training with ``transformers.Trainer``: devices, mixed precision, checkpoints and resuming are its business."""

from __future__ import annotations

import errno
import inspect
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import Sampler

from exporters.files import sync_folder
from ziplm_deploy.documents import read_json
from ziplm_deploy.errors import DataError, EnvironmentMismatchError, NumericalError, RecipeError, StorageError
from ziplm_deploy.machine import distributed
from ziplm_deploy.progress import Progress
from ziplm_deploy.recipe import TrainConfig
from ziplm_deploy.recovery.examples import POSITION, Examples, LengthGrouped
from ziplm_deploy.recovery.objective import Objective, Student
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.tasks.batching import Batch

WEIGHTS = "model.safetensors"
STATE = "trainer_state.json"  # Trainer writes it last: a checkpoint without it was not finished


class DistillationTrainer(transformers.Trainer):
    """Stock Trainer with this package's loss; its checkpoints hold safetensors, also for layers of unlike shapes.

    They hold what is trained: of adapters nothing of the model itself.
    """

    def __init__(self, student: Student, objective: Objective, examples: Examples, **settings: Any) -> None:
        super().__init__(student, train_dataset=examples, data_collator=examples.collate, **settings)
        self.model_accepts_loss_kwargs = False
        # Trainer sets it only when it trains; the estimate needs it before.
        self.current_gradient_accumulation_steps = 1
        self.student, self._objective, self._examples = student, objective, examples

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        batch = {name: value for name, value in inputs.items() if name != POSITION}
        with self.accelerator.autocast():  # the teacher too; Trainer itself gives a GPU's precision to the student only
            loss = self._objective(model(**batch), batch, inputs[POSITION], self.student.layers)
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"expected a finite loss, found {loss.item()} in step {self.state.global_step + 1}; lower the learning "
                f"rate or use precision fp32. {self._kept()}"
            )
        return loss

    def _kept(self) -> str:
        """What a failure leaves, in words."""
        checkpoint = last_checkpoint(Path(self.args.output_dir or "."))
        return "No checkpoint was due yet" if checkpoint is None else f"{checkpoint.name} is kept"

    def typical_batch(self, quantile: float) -> Batch:
        """A batch of neighbours in length at a quantile of all lengths."""
        lengths, size = self._examples.lengths, self.args.per_device_train_batch_size
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        start = int(quantile * (len(order) - size))
        return self._examples.collate([self._examples[index] for index in order[start : start + size]])

    def uncached_steps(self, total: int) -> int:
        """Steps, of ``total``, in which the teacher will have to answer."""
        teacher = self._objective.teacher
        if teacher is None or not teacher.caching:
            return total
        size = self.args.per_device_train_batch_size * self.args.world_size
        return min(total, math.ceil((len(self._examples) - teacher.n_cached) / int(size)))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        size = self.args.per_device_train_batch_size * self.args.world_size
        return LengthGrouped(self._examples.lengths, size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.student.parameters()):
            raise NumericalError(
                f"expected finite weights, found NaN or infinity after step {self.state.global_step}; lower the "
                f"learning rate or use precision fp32. {self._kept()}"
            )
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.student.learned, str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_model(self.student.learned, str(Path(resume_from_checkpoint) / WEIGHTS))


class _Watcher(transformers.TrainerCallback):
    """Steps as progress; losses and the seconds of the steps themselves as a record."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.began = time.monotonic()
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.first_step = time.monotonic(), state.global_step

    def record(self, state: Any, device: str, batch: int) -> TrainingRecord:
        """What the training took that has just ended."""
        seconds, steps = time.monotonic() - self.began, state.global_step
        return TrainingRecord(
            device=device,
            steps=steps,
            examples_per_step=batch,
            seconds=seconds,
            samples_per_second=batch * (steps - self.first_step) / seconds,
            losses=[(int(entry["step"]), float(entry["loss"])) for entry in state.log_history if "loss" in entry],
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._progress.step(state.global_step, state.max_steps)
        # a resumed training knows nothing of the losses that were not logged before its checkpoint
        control.should_log |= control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep only the newest checkpoint; by step, as file times may be too coarse for Trainer's own rotation.

        It is on the disk before the one before it goes.
        """
        if state.is_world_process_zero:
            sync_folder(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            for path in Path(args.output_dir).glob("checkpoint-*"):
                if path.name != f"checkpoint-{state.global_step}":
                    shutil.rmtree(path, ignore_errors=True)


def train(
    student: Student,
    objective: Objective,
    examples: Examples,
    config: TrainConfig,
    folder: Path,
    *,
    seed: int,
    progress: Progress,
    title: str,
) -> TrainingRecord:
    """Train ``student`` in place; checkpoints go to ``folder``, from which a killed training goes on.

    Raises:
        DataError: fewer examples than one batch.
        NumericalError: NaN or infinite loss or weights; names the step, keeps the last good checkpoint.
        StorageError: a checkpoint cannot be written.  RecipeError: the logger is unknown or not installed.
        EnvironmentMismatchError: the device has too little memory.
    """
    arguments = training_arguments(config, folder, seed)
    batch = config.batch_size * arguments.world_size
    if len(examples) < batch:
        raise DataError(
            f"expected at least one batch of {batch} training examples for {title}, found {len(examples)}; give more "
            "data in data.train or a smaller batch_size"
        )
    left = total_steps(config, len(examples), batch)
    arguments.warmup_steps = math.ceil(config.warmup_ratio * left)
    watcher = _Watcher(progress)
    trainer = _trainer(student, objective, examples, config, arguments, watcher)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        progress.note(f"{title}: goes on from {checkpoint.name}")
        left -= step_of(checkpoint)
        if left <= 0:  # it was trained to its end, but not saved
            return _finished(trainer, checkpoint, watcher, batch)
    student.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(distributed.threads_of_this_process(threads))
    try:
        progress.note(f"{title}: {left} steps of {batch} examples on {arguments.device}, {_eta(trainer, left)}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, SafetensorError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise EnvironmentMismatchError(
                f"expected {arguments.device} to hold a step of {config.batch_size} examples, found: {error}; lower "
                "batch_size, or environment.workload.seq_len (text-generation: data.context)"
            ) from error
        if not _is_full_disk(error):
            raise
        raise StorageError(
            f"expected to write a checkpoint in {folder}, found: {error}; free disk space, the same command goes on "
            "from the last whole checkpoint"
        ) from error
    finally:
        student.eval()
        torch.set_num_threads(threads)
    return watcher.record(trainer.state, str(arguments.device), batch)


def _finished(trainer: DistillationTrainer, checkpoint: Path, watcher: _Watcher, batch: int) -> TrainingRecord:
    trainer._load_from_checkpoint(str(checkpoint))
    state = transformers.TrainerState.load_from_json(str(checkpoint / STATE))
    watcher.first_step = state.global_step
    return watcher.record(state, str(trainer.args.device), batch)


def _trainer(
    student: Student,
    objective: Objective,
    examples: Examples,
    config: TrainConfig,
    arguments: transformers.TrainingArguments,
    watcher: _Watcher,
) -> DistillationTrainer:
    try:
        trainer = DistillationTrainer(student, objective, examples, args=arguments, callbacks=[watcher])
    except (ImportError, RuntimeError, ValueError) as error:
        if config.report_to == "none":
            raise
        raise RecipeError(
            f"expected an installed logger of Trainer in report_to, found {config.report_to!r}: {error}; install it or "
            "set report_to: none"
        ) from error
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)  # type: ignore[no-untyped-call, unused-ignore]
    return trainer


def training_arguments(config: TrainConfig, folder: Path, seed: int) -> transformers.TrainingArguments:
    """Trainer's own settings; on a GPU if there is one, else on all granted cores."""
    # Trainer would keep the precision of an earlier training in this process, or of accelerate's own settings.
    os.environ["ACCELERATE_MIXED_PRECISION"] = {"fp32": "no"}.get(config.arithmetic, config.arithmetic)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",  # `train` sets warmup_steps, for which it must know how many steps there are
        weight_decay=config.weight_decay,
        bf16=config.arithmetic == "bf16",
        fp16=config.arithmetic == "fp16",
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_steps=20,
        seed=seed,
        report_to=config.report_to,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        **_tensorboard_logs(folder.parent.parent / "logs" / folder.name),  # the checkpoints' folder does not last
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs take several processes: accelerate launch
    return arguments


def _tensorboard_logs(folder: Path) -> dict[str, Any]:
    """Where TensorBoard's logs go: a setting of Trainer at first, later in transformers 5 an environment variable."""
    if "logging_dir" in inspect.signature(transformers.TrainingArguments).parameters:
        return {"logging_dir": str(folder)}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
    return {}


def total_steps(config: TrainConfig, n_examples: int, batch: int) -> int:
    """Optimizer steps of a training."""
    return config.max_steps or math.ceil(config.epochs * math.ceil(n_examples / batch))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; one whose writing was interrupted is removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append((step_of(path), path))
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return int(read_json(checkpoint / STATE)["global_step"])


def _eta(trainer: DistillationTrainer, total: int) -> str:
    """Time that ``total`` steps take, from whole steps (of rate 0) on batches of typical lengths."""
    student = trainer.student
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    first: list[float] = []
    again: list[float] = []
    with torch.random.fork_rng():
        for quantile in (0.5, 0.2, 0.5, 0.8):
            batch = trainer.typical_batch(quantile)
            for timings in (first, again):  # the second time the teacher may know its answers already
                began = time.perf_counter()
                trainer.training_step(student, dict(batch))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                timings.append(time.perf_counter() - began)
    slow, fast = (sum(timings[1:]) / (len(timings) - 1) for timings in (first, again))  # the first one warms up
    n_new = trainer.uncached_steps(total)
    seconds = n_new * slow + (total - n_new) * fast
    return f"about {seconds / 60:.1f} min ({1000 * seconds / total:.0f} ms a step, measured)"


def _is_full_disk(error: BaseException) -> bool:
    """Whether a write found no room; safetensors and torch report that as errors of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(part in str(error).lower() for part in ("no space", "enospc", "writing file"))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, whose allocator has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error).lower()
