"""The INT8 files of a member: scales from data or from training, and as many linears in INT8 as accuracy allows."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from exporters import ExportError, to_integer_matmul
from exporters.names import HEAD
from exporters.nbits_matmul import OLDEST_ENGINE, BlockWeights
from ziplm_deploy.artifacts import atomic_path, content_key, file_bytes
from ziplm_deploy.compression.int8.budget import Spared, SparedChoice, within_budget
from ziplm_deploy.compression.int8.embeddings import has_rounded_embeddings, round_embeddings_of
from ziplm_deploy.compression.int8.fake_quant import (
    insert_fake_quant,
    learned_ranges,
    module_ranges,
    quantizable_linears,
    remove_fake_quant,
)
from ziplm_deploy.compression.int8.forms import (
    BITS,
    FORMS,
    Cost,
    Form,
    Mixture,
    MixtureChoice,
    fastest_within,
    mixtures,
    that_fit,
)
from ziplm_deploy.compression.int8.linear_times import LinearTimes, linear_shapes
from ziplm_deploy.compression.int8.neural_compressor import quantize_with_neural_compressor
from ziplm_deploy.compression.int8.quantize import linear_ranges, quantize
from ziplm_deploy.compression.int8.scales import ActivationRange, LinearScales
from ziplm_deploy.compression.int8.sensitivity import SensitivityRow
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.int8.weight_only import asked_bits, weight_only_linears
from ziplm_deploy.compression.onnx_graphs import MOST_BYTES
from ziplm_deploy.compression.records import Int8Record, LinearMixture, LinearRanking, LinearSensitivity
from ziplm_deploy.compression.sparsity.masks import check_masks_in_onnx, zero_masks, zeros_held
from ziplm_deploy.compression.treatment import reduces_range, served_int8, suits_weight_only
from ziplm_deploy.documents import score_text
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import UsageError
from ziplm_deploy.machine import distributed
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.models.member_files import load
from ziplm_deploy.recipe import Variant
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.run.member import ModelFile
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.budget import BudgetJudge
from ziplm_deploy.stages.export import check_difference, export_checked, export_stage
from ziplm_deploy.stages.prepare_weights import rounded_in_file, smoothed_file
from ziplm_deploy.stages.rank_linears import ranked_linears
from ziplm_deploy.stages.recover import distillation, training_key
from ziplm_deploy.stages.time_linears import linear_times

Choice = SparedChoice | MixtureChoice
Ranges = dict[str, ActivationRange] | dict[str, LinearScales] | None


def quantize_file(run: Run, file: ModelFile) -> None:
    """``model_int8.onnx`` or ``model_sparse_int8.onnx`` of a member, and the record of how it was made."""
    recipe, config = run.recipe, served_int8(run.recipe)
    source = file.member.sparse_folder if file.variant.is_sparse else file.member.folder
    trains, engine = config.method == "qat", recipe.environment.engine
    settings = Int8Settings(config, engine, reduces_range(config))
    ranking = ranked_linears(run, file.member, settings)
    times = linear_times(run, settings) if config.mixed else None
    key = content_key(
        source=run.file_hash(source / Variant.FP32.file_name),
        int8=config,
        weight_bits=reduces_range(config),
        calibration=run.data.calibration_key,
        evaluation=run.data.evaluation_key,
        environment=recipe.environment.fingerprint,
        training=training_key(run, recipe.compress.train) if trains else None,
        ranking=run.file_hash(file.member.linear_ranking),
        **({"times": run.file_hash(run.folder.linear_times)} if config.mixed else {}),
    )
    training = file.label.replace(" ", "-")
    checkpoints = run.folder.checkpoints(training, key)
    work = _Quantization(run, file, source, checkpoints, settings, ranking, times).make
    stage = quantization_stage(file)
    run.folder.make(stage, key, [file.path, file.int8_record], work, together=trains)
    check_difference(run, stage)
    run.folder.drop_checkpoints(training)


def check_differences(run: Run) -> None:
    """Refuse any file of the family that the recipe would not take any more; see :func:`check_difference`."""
    for member in run.members:
        check_difference(run, export_stage(member, member.folder))
        for variant in run.recipe.compress.variants:
            check_difference(run, quantization_stage(member.file(variant)))
            if variant.is_sparse:
                check_difference(run, export_stage(member, member.sparse_folder))


def quantization_stage(file: ModelFile) -> str:
    """Name of the stage; manifests know it by the spelling that it began with."""
    return f"quantise {file.label}"


def int8_record(file: ModelFile) -> Int8Record | None:
    """How a member's file became INT8; None for one that is not INT8.

    Raises:
        CorruptArtifactError: the record is missing or damaged.
    """
    return Int8Record.load(file.int8_record) if file.variant.is_int8 else None


class _Quantization:
    """One file on its way from float32 to INT8."""

    def __init__(
        self,
        run: Run,
        file: ModelFile,
        source: Path,
        checkpoints: Path,
        settings: Int8Settings,
        ranking: LinearRanking,
        times: LinearTimes | None,
    ) -> None:
        self.run, self.file, self.source = run, file, source
        self.checkpoints = checkpoints
        self.settings, self.smoothing, self.times = settings, ranking.smoothing, times
        self.sensitivities = [SensitivityRow(**row.model_dump()) for row in ranking.linears]
        self.config, self.engine = settings.config, settings.engine
        self.rounded: dict[str, BlockWeights] = {}  # by GPTQ
        self.mixture: LinearMixture | None = None  # what the chosen one takes, beside one form for all

    def make(self) -> None:
        """Write the file, checked, and its record; trained weights stay in their checkpoint until both are there."""
        if suits_weight_only(self.run.recipe) and self.config.fallback is None:
            self.run.progress.note(
                f"{self.file.label}: linears that INT8 hurts stay float32; onnxruntime from {OLDEST_ENGINE[8]} on has "
                "weight-only ones of 8 bits, which decode faster"
            )
        model = load(self.source)
        with tempfile.TemporaryDirectory(prefix="int8-", dir=scratch_root()) as scratch:
            made = Path(scratch) / "made.onnx"
            if not quantizable_linears(model):  # every module was dropped: the float32 file is nearly the INT8 file
                if distributed.is_first():
                    shutil.copyfile(self.source / Variant.FP32.file_name, made)
                    if self.config.embeddings:
                        round_embeddings_of(made)
                    _publish(made, self.file.path)
                    self._record(None, None, has_rounded_embeddings(made)).save(self.file.int8_record)
                return
            judge = self._judge() if distributed.is_first() else None
            training, choice = self._make(model, made, Path(scratch), judge)
            if not distributed.is_first():
                return
            if self.file.variant.is_sparse:
                check_masks_in_onnx(made, model)
            _publish(made, self.file.path)
            found = self._record(choice, training, has_rounded_embeddings(made), judge, weight_only_linears(made))
        found.save(self.file.int8_record)

    def _make(
        self, model: nn.Module, made: Path, scratch: Path, judge: BudgetJudge | None
    ) -> tuple[TrainingRecord | None, Choice | None]:
        """Write the file, as the first process; all of them train."""
        run, onnx, batches = self.run, self.source / Variant.FP32.file_name, self.run.data.ranges_batches
        training: TrainingRecord | None = None
        ranges: Ranges = None
        if self.config.method == "qat":
            ranges, training = self._train(model, batches)
            onnx = scratch / Variant.FP32.file_name
            difference = export_checked(run, model, onnx, f"{self.file.label}, trained")
            run.folder.set_difference(quantization_stage(self.file), difference)
        elif self.smoothing and distributed.is_first():
            smoothed = scratch / Variant.FP32.file_name
            found = smoothed_file(run, model, smoothed, self.smoothing, self.file.label)
            if found is None:
                model, self.smoothing = load(self.source), {}
            else:
                onnx = smoothed
                run.folder.set_difference(quantization_stage(self.file), found)
        choice: Choice | None = None
        if distributed.is_first():
            asked = asked_bits((row.name for row in self.sensitivities), self.config.weight_only_4)
            four = [row.name for row in self.sensitivities if row.gptq and (row.name in asked or self.config.mixed)]
            self.rounded = rounded_in_file(run, model, onnx, four)
            calibrated = linear_ranges(onnx, _arrays(batches), self.config) if self.config.method == "static" else None
            if self.times is not None and judge is not None:
                choice = self._mixed(onnx, made, self.times, judge)
            elif self.config.backend == "neural-compressor":
                choice = self._by_neural_compressor(onnx, made, calibrated, judge)
            else:
                choice = self._within_budget(onnx, made, ranges or calibrated, judge)
        return training, choice

    def _train(
        self, model: nn.Module, batches: list[dict[str, Tensor]]
    ) -> tuple[dict[str, LinearScales], TrainingRecord]:
        """Weights, in place, and scales, trained together; zeros of a sparse model stay."""
        run, title = self.run, self.file.label
        insert_fake_quant(model, module_ranges(model, batches), self.settings)
        with zeros_held(model, zero_masks(model)) if self.file.variant.is_sparse else contextlib.nullcontext():
            training = distillation(run).train(model, run.recipe.compress.train, self.checkpoints, title)
        ranges = learned_ranges(model)
        remove_fake_quant(model)
        return ranges, training

    def _within_budget(
        self,
        onnx: Path,
        destination: Path,
        ranges: Ranges,
        judge: BudgetJudge | None,
    ) -> SparedChoice | None:
        """Write the file with as few linears spared as the budget needs; None: nothing to judge it by."""
        asked = asked_bits((row.name for row in self.sensitivities), self.config.weight_only_4)

        def write(spared: Spared, path: Path) -> None:
            keep = spared.names if spared.form == "float32" else ()
            weight_only = {name: bits for name, bits in asked.items() if name not in spared.names}
            if spared.form == "weight-only-8":
                weight_only |= dict.fromkeys(spared.names, 8)
            quantize(
                onnx,
                path,
                self.settings,
                keep_fp32=keep,
                ranges=None if ranges is None else {name: ranges[name] for name in ranges if name not in keep},
                weight_only=weight_only,
                rounded=self._rounded_of(weight_only),
            )

        if judge is None:
            write(Spared(), destination)
            return None
        title = self.file.label

        def tried(spared: Spared, score: float) -> None:
            self.run.progress.note(f"{title}: {score_text(score)} with {len(spared.names)} linears in {spared.form}")

        return within_budget(
            destination, write, judge.score, self.sensitivities, judge.reference_score, self.config, tried
        )

    def _mixed(self, onnx: Path, destination: Path, times: LinearTimes, judge: BudgetJudge) -> MixtureChoice:
        """Write the file with the fastest mixture of forms that the budget allows."""
        n_weights = {name: math.prod(shape) for name, shape in linear_shapes(onnx).items()}
        others = file_bytes(onnx) - 4 * sum(n_weights.values())
        costs = {
            row.name: {
                form: Cost(times.ms(row.name, n_weights[row.name], form), row.by_form.get(form, 0.0)) for form in FORMS
            }
            for row in self.sensitivities
        }
        ladder = mixtures(costs, self.config.max_fp32_share)
        head = n_weights.get(HEAD, 0)
        embedding = (1 if self.config.embeddings else 4) * head
        if others >= 4 * head:  # there is an embedding of the vocabulary beside it, now in float32
            others, embedding = others - (4 * head - embedding), 0
        ladder = that_fit(ladder, n_weights, MOST_BYTES - others, embedding)

        def write(mixture: Mixture, path: Path) -> None:
            weight_only = {name: BITS[form] for name, form in mixture.forms.items() if form in BITS}
            rounded, kept = self._rounded_of(weight_only), mixture.named("float32")
            quantize(onnx, path, self.settings, keep_fp32=kept, weight_only=weight_only, rounded=rounded)

        def tried(mixture: Mixture, score: float) -> None:
            counts = ", ".join(f"{n} {form}" for form in FORMS if (n := len(mixture.named(form))))
            what = f"{score_text(score)} with {counts}, {mixture.ms:.1f} ms of linears"
            self.run.progress.note(f"{self.file.label}: {what}")

        reference, max_loss = judge.reference_score, self.config.max_loss
        choice = fastest_within(destination, write, judge.score, ladder, reference, max_loss, tried)
        alike: dict[Form, float] = {form: sum(of[form].ms for of in costs.values()) for form in FORMS}
        self.mixture = LinearMixture(ms=choice.mixture.ms, int8_ms=alike["int8"], float32_ms=alike["float32"])
        return choice

    def _rounded_of(self, weight_only: dict[str, int]) -> dict[str, BlockWeights]:
        """What is known of those that have 4 bits in this candidate."""
        return {name: self.rounded[name] for name, bits in weight_only.items() if bits == 4 and name in self.rounded}

    def _judge(self) -> BudgetJudge | None:
        """Who scores candidates: the engine that serves, unless a candidate may end its process."""
        if self.run.recipe.data.evaluation is None:
            return None
        by_tool = self.config.backend == "neural-compressor"
        engine = "onnxruntime" if by_tool or get_engine(self.engine).may_abort else self.engine
        return BudgetJudge(self.run, self.file.variant, engine, self.source / Variant.FP32.file_name)

    def _by_neural_compressor(
        self,
        onnx: Path,
        destination: Path,
        ranges: dict[str, ActivationRange] | None,
        judge: BudgetJudge | None,
    ) -> SparedChoice | None:
        """The file as neural-compressor tunes it; its candidates are scored by ONNX Runtime."""
        scores: list[float] = []
        with tempfile.TemporaryDirectory(prefix="int8-", dir=scratch_root()) as folder:
            made, candidate = Path(folder) / "model.onnx", Path(folder) / "candidate.onnx"

            def evaluate(judge: BudgetJudge, path: Path) -> float:
                if not scores:  # the first file is the float32 one
                    scores.append(judge.reference_score)
                    return scores[-1]
                shutil.copyfile(path, candidate)
                if self.config.embeddings:
                    round_embeddings_of(candidate)
                scores.append(judge.score(candidate))
                self.run.progress.note(
                    f"{self.file.label}: neural-compressor's file {len(scores) - 1} scores {score_text(scores[-1])}"
                )
                return scores[-1]

            result = quantize_with_neural_compressor(
                onnx,
                made,
                self.settings,
                ranges=ranges,
                evaluate=None if judge is None else functools.partial(evaluate, judge),
            )
            if self.config.embeddings:
                round_embeddings_of(made)
            with atomic_path(destination) as temporary:
                if self.engine == "deepsparse":
                    try:
                        to_integer_matmul(made, temporary)
                    except ExportError as error:
                        raise UsageError(
                            f"expected a file of neural-compressor that DeepSparse's form can express, found: {error}; "
                            "set compress.int8.backend: onnxruntime"
                        ) from error
                else:
                    shutil.copyfile(made, temporary)
        if judge is None:
            return None
        reference, *tried = scores
        kept = result.fp32_linears
        counted = tuple((len(kept), score) for score in tried)
        return SparedChoice(max(tried), reference, counted, bool(result.met), spared=Spared(kept))

    def _record(
        self,
        choice: Choice | None,
        training: TrainingRecord | None,
        embeddings: bool,
        judge: BudgetJudge | None = None,
        weight_only: dict[str, int] | None = None,
    ) -> Int8Record:
        judged: dict[str, Any] = {}
        if judge is not None and choice is not None:
            judge.forget_others(self.file.path)
            judged = {
                "n_choosing": judge.n_choosing,
                "whole_score": judge.whole_score(self.file.path),
                "whole_reference_score": judge.whole_reference_score,
            }
        return Int8Record(
            method=self.config.method,
            backend=self.config.backend,
            ranges=self.config.ranges,
            per_channel=self.config.per_channel,
            weight_bits=self.settings.weight_bits,
            embeddings=embeddings,
            n_linears=len(self.sensitivities),
            fp32_linears=[] if choice is None else list(choice.fp32_linears),
            weight_only=weight_only or {},
            reference_score=None if choice is None else choice.reference_score,
            scores=[] if choice is None else [score for _, score in choice.tried],
            within_budget=None if choice is None else choice.within_budget,
            sensitivities=[LinearSensitivity(**asdict(row)) for row in self.sensitivities],
            ruined_by_outliers=[row.name for row in self.sensitivities if row.ruined_by_outliers],
            training=training,
            mixture=self.mixture,
            smoothing=self.smoothing,
            **judged,
        )


def _publish(made: Path, destination: Path) -> None:
    with atomic_path(destination) as temporary:
        shutil.copyfile(made, temporary)


def _arrays(batches: list[dict[str, Tensor]]) -> list[dict[str, np.ndarray]]:
    return [{name: value.numpy() for name, value in batch.items()} for batch in batches]
