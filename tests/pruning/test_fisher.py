"""Fisher information at modules' outputs: its labels, its scale, the order that it gives, losses without measuring."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.autograd.functional import hessian

from tests.helpers.models import BLOCK_TYPES, IMAGE_TYPES, random_entries, tiny_causal_model, tiny_inputs, tiny_model
from tests.pruning.test_planner import table
from ziplm_deploy.errors import NumericalError, UsageError
from ziplm_deploy.models.modules import output_linear, prunable_modules
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.pruning import fisher
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.compensations import obs_levels
from ziplm_deploy.pruning.database import Database, build_database
from ziplm_deploy.pruning.fisher import fisher_bytes, fisher_information
from ziplm_deploy.pruning.methods import OutputLinear
from ziplm_deploy.pruning.methods.base import FISHER_FLOOR
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.planner import Calibration, Planner, database_sizes
from ziplm_deploy.recipe import ModelConfig, PruneConfig, SearchConfig
from ziplm_deploy.tasks import Task, get_task
from ziplm_deploy.tasks.multilabel import MultiLabelClassification

SIMILARITY = ModelConfig(path="x", task="sentence-similarity", similarity="dot")
TASKS: dict[str, tuple[Task, tuple[int, ...]]] = {
    "classes": (get_task("text-classification"), (1, 4)),
    "several labels": (MultiLabelClassification(ModelConfig(path="x", task="text-classification")), (1, 4)),
    "answers": (get_task("question-answering"), (2, 1, 4)),
    "values": (get_task("text-regression"), (1, 1)),
    "embeddings": (get_task("sentence-similarity"), (1, 4)),
    "embeddings by dot product": (get_task(SIMILARITY), (1, 4)),
}
DRAWS = 40_000
CAUSAL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox")
ROOM = 2**30  # bytes that F may take


@pytest.mark.parametrize("name", TASKS)
def test_gradients_of_drawn_losses_have_the_curvature_of_the_divergence(name: str) -> None:
    task, shape = TASKS[name]
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    many = features.repeat_interleave(DRAWS, dim=-2).requires_grad_()
    task.sampled_loss(many, torch.Generator().manual_seed(2)).backward()
    assert many.grad is not None
    drawn = many.grad.reshape(-1, DRAWS, shape[-1])  # [rows, draws, size]
    n_rows = features.shape[:-1].numel()

    def divergence(candidate: Tensor) -> Tensor:
        return n_rows * task.divergence(candidate, features)

    size = shape[-1]
    wanted = hessian(divergence, features).reshape(n_rows, size, n_rows, size)  # type: ignore[no-untyped-call]
    for row in range(n_rows):
        found = drawn[row].T @ drawn[row] / DRAWS
        torch.testing.assert_close(found, wanted[row, :, row], rtol=0.05, atol=0.03)


def with_noise(model: nn.Module, linear: nn.Linear, scale: float, generator: torch.Generator) -> object:
    return linear.register_forward_hook(lambda _m, _a, y: y + scale * torch.randn(y.shape, generator=generator))


@pytest.mark.parametrize("task_name", ["text-classification", "sentence-similarity"])
def test_noise_at_an_output_costs_what_its_information_says(task_name: str) -> None:
    task = get_task(task_name)
    model = tiny_model("bert", task_name).eval()
    batch = tiny_inputs(model, 4, 9, 0)
    modules = prunable_modules(model)
    information = fisher_information(model, task, [batch] * 100, modules, seed=0, memory_limit_bytes=ROOM)
    generator, scale, draws = torch.Generator().manual_seed(3), 0.01, 300
    with torch.no_grad():
        dense = task.compared(model, batch)
        for module in modules[1:3]:
            handle = with_noise(model, output_linear(model, module), scale, generator)
            losses = [
                float(task.divergence(task.compared(model, batch).double(), dense.double())) for _ in range(draws)
            ]
            handle.remove()  # type: ignore[attr-defined]
            expected = scale**2 / 2 * float(information[module.name].trace())
            assert np.mean(losses) == pytest.approx(expected, rel=0.2), module.name


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_the_pass_leaves_the_model_as_it_was_and_repeats_itself(model_type: str) -> None:
    task_name = "image-classification" if model_type == "vit" else "text-classification"
    model, task = tiny_model(model_type, task_name).train(), get_task(task_name)
    next(model.parameters()).requires_grad_(False)
    before = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    batches = [tiny_inputs(model, 3, 7, seed) for seed in range(2)]
    first, again, other = (
        fisher_information(model, task, batches, prunable_modules(model), seed=seed, memory_limit_bytes=ROOM)
        for seed in (0, 0, 1)
    )
    assert [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()] == before
    assert model.training
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    for name, matrix in first.items():
        torch.testing.assert_close(matrix, again[name], rtol=0, atol=0)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-6 * matrix.trace()
    assert any(not torch.equal(matrix, other[name]) for name, matrix in first.items())


def outer_products(model: nn.Module, task: Task, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of g gᵀ by plain gradients of retained outputs."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            kept[name] = output

        return hook

    handles = [output_linear(model, m).register_forward_hook(keep(m.name)) for m in prunable_modules(model)]
    features = task.distilled(task.forward(model, batch), batch)
    task.sampled_loss(features, torch.Generator().manual_seed(0)).backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    n_rows = features.shape[:-1].numel()
    gradients = {name: output.grad.flatten(0, -2) for name, output in kept.items() if output.grad is not None}
    return {name: (g.T @ g).double() / n_rows for name, g in gradients.items()}


@pytest.mark.parametrize("model_type", [*BLOCK_TYPES, *CAUSAL_TYPES])
def test_layers_that_are_computed_again_give_what_plain_gradients_give(model_type: str) -> None:
    if model_type in CAUSAL_TYPES:
        model, task_name = tiny_causal_model(model_type), "text-generation"
    else:
        task_name = "image-classification" if model_type in IMAGE_TYPES else "text-classification"
        model = tiny_model(model_type, task_name)
    task, batch = get_task(task_name), tiny_inputs(model, 2, 7, 0)
    had_cache = getattr(model.config, "use_cache", None)
    found = fisher_information(model, task, [batch], prunable_modules(model), seed=0, memory_limit_bytes=ROOM)
    assert getattr(model.config, "use_cache", None) == had_cache
    expected = outer_products(model, task, batch)
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        torch.testing.assert_close(matrix, expected[name], rtol=1e-3, atol=1e-5 * float(matrix.abs().max()))


def test_a_model_that_gives_nan_is_refused_by_name() -> None:
    model = tiny_model("bert", "text-classification")
    output_linear(model, prunable_modules(model)[-1]).weight.data.fill_(1e38)
    model.classifier.weight.data.fill_(1e38)  # type: ignore[union-attr, operator]
    with pytest.raises((NumericalError, RuntimeError)):
        information_of(model)


def read_by(task_name: str, batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the pass reads of batches."""
    model = tiny_causal_model("llama") if task_name == "text-generation" else tiny_model("bert", task_name)
    task, shapes = get_task(task_name), []
    forward = type(task).forward

    def spy(self: Task, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        shapes.append(tuple(batch["input_ids"].shape))
        return forward(self, model, batch)

    monkeypatch.setattr(type(task), "forward", spy)
    fisher_information(model, task, batches, prunable_modules(model), seed=0, memory_limit_bytes=ROOM)
    return shapes


def test_all_lengths_are_read_and_long_windows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert", "text-classification")
    batches = [tiny_inputs(model, 8, length, 0) for length in range(4, 24)]  # sorted, as calibration examples are
    for batch in batches:
        batch["attention_mask"].fill_(1)
    monkeypatch.setattr(fisher, "ENOUGH_TOKENS", 400)
    monkeypatch.setattr(fisher, "TOKENS_AT_ONCE", 40)
    shapes = read_by("text-classification", batches, monkeypatch)
    assert 400 <= sum(rows * length for rows, length in shapes) <= 500
    lengths = [length for _, length in shapes]
    assert (min(lengths) < 9, max(lengths) > 19) == (True, True)
    windows = [{name: value for name, value in batches[-1].items() if name != "token_type_ids"}]
    monkeypatch.setattr(fisher, "TOKENS_AT_ONCE", 10)
    assert {length for _, length in read_by("text-generation", windows, monkeypatch)} == {10}


def test_more_than_the_memory_limit_holds_is_refused() -> None:
    model = tiny_model("bert", "text-classification")
    needed = fisher_bytes([32] * len(prunable_modules(model)))
    information_of(model, needed)
    with pytest.raises(
        UsageError, match=r"within prune\.memory_limit_gb = 0\.00, found that it takes 0\.00 GiB; raise"
    ):
        information_of(model, needed - 1)


def information_of(model: nn.Module, memory_limit_bytes: int = ROOM) -> dict[str, Tensor]:
    return fisher_information(
        model,
        get_task("text-classification"),
        [tiny_inputs(model)],
        prunable_modules(model),
        seed=0,
        memory_limit_bytes=memory_limit_bytes,
    )


def problem(seed: int = 0) -> tuple[OutputLinear, Tensor, Tensor]:
    """A linear of 4 outputs and 6 inputs with its Fisher information, inputs X [d, N], and L."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X = normal(6, 6) @ normal(6, 4000) + 0.5
    gradients = normal(4, 4) * torch.tensor([3.0, 1.0, 0.3, 0.01], dtype=torch.float64)
    fisher = gradients.T @ gradients
    moments = InputMoments(X @ X.T / X.shape[1], X.mean(1), X.shape[1])
    linear = OutputLinear.of(normal(4, 6), normal(4), moments, 1, fisher)
    assert linear.factor is not None
    floor = FISHER_FLOOR * fisher.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(linear.factor @ linear.factor.T, fisher + floor)
    return linear, X, linear.factor


@pytest.mark.parametrize("seed", range(4))
def test_levels_lose_least_where_the_information_says_it_counts(seed: int) -> None:
    linear, X, L = problem(seed)
    prune = PruneConfig(damping=1e-9, fisher=True)
    # so few columns would get the damping of small samples: it is what the moments' tokens are for
    found, _ = obs_levels(linear, [5, 3], prune)
    dense = L.T @ (linear.weight @ X + linear.bias[:, None])

    def error(kept: Tensor, weight: Tensor, bias: Tensor) -> float:
        pruned = L.T @ (weight.double() @ X[kept] + bias.double()[:, None])
        return float((pruned - dense).square().sum() / dense.square().sum())

    for level in found.values():
        assert level.relative_error == pytest.approx(error(level.kept, level.weight, level.bias), rel=1e-3)
    best = min(best_error(L.T @ linear.weight, X, kept) for kept in itertools.combinations(range(6), 5))
    total = float(dense.square().sum())
    assert found[5].relative_error == pytest.approx(best / total, rel=1e-2), "the first to go is the cheapest one"


def best_error(W: Tensor, X: Tensor, kept: tuple[int, ...]) -> float:
    """Least squared error of outputs from some inputs and a constant."""
    inputs = torch.cat([X[list(kept)], torch.ones(1, X.shape[1], dtype=X.dtype)])
    target = (W @ X).T
    solution = torch.linalg.lstsq(inputs.T, target).solution
    return float((target - inputs.T @ solution).square().sum())


def test_an_identity_changes_nothing() -> None:
    linear, _, _ = problem()
    prune = PruneConfig()
    plain = OutputLinear(linear.weight, linear.bias, linear.moments, 1)
    scaled = OutputLinear.of(linear.weight, linear.bias, linear.moments, 1, 5 * torch.eye(4, dtype=torch.float64))
    for size, level in obs_levels(plain, [4, 2], prune)[0].items():
        other = obs_levels(scaled, [4, 2], prune)[0][size]
        assert torch.equal(level.kept, other.kept)
        torch.testing.assert_close(level.weight, other.weight)
        assert level.relative_error == pytest.approx(other.relative_error)


def test_a_plan_comes_without_measured_sensitivities(tmp_path) -> None:  # type: ignore[no-untyped-def]
    dense = tiny_model("bert")
    model = resize(dense, random_entries(dense, {"1.attention": 0}))
    task = get_task("sentence-similarity")
    batches = [tiny_inputs(model, 8, 9, seed) for seed in range(6)]
    modules = prunable_modules(model)
    stats = collect_statistics(model, batches, modules, memory_limit_bytes=2**30)
    information = fisher_information(model, task, batches, modules, seed=0, memory_limit_bytes=ROOM)
    assert "1.attention" not in information, "it was dropped before"
    search = SearchConfig(sensitivity_levels=0, coefficient_steps=4, swap_evaluations=8)
    prune = PruneConfig(fisher=True, search=search)
    database = build_database(model, stats, database_sizes(model, table()), prune, fisher=information)
    database.save(tmp_path / "database.safetensors")
    loaded = Database.load(tmp_path / "database.safetensors")
    assert loaded.losses == database.losses
    assert set(loaded.losses) == set(information)
    planner = Planner(model, task, table(), loaded, Calibration(batches, batches[:2], batches[2:4]), prune, seed=0)
    curves = planner.sensitivities()
    for name, curve in zip(planner.space.modules, curves, strict=True):
        whole = loaded.losses.get(name, 0.0)
        np.testing.assert_allclose(curve[-1], whole * loaded.modules[name][0].relative_error)
    plan = planner.plan(2.0)
    assert plan.predicted_speedup >= 2.0
    assert plan.search_loss is not None


def test_what_the_information_cannot_serve_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected method ziplm beside fisher, found flap"):
        PruneConfig(method="flap", fisher=True)
    with pytest.raises(ValidationError, match="or set fisher: true"):
        PruneConfig(search=SearchConfig(sensitivity_levels=0))
    with pytest.raises(ValidationError, match="sensitivity_levels of 1 or more, found 0; leave it out"):
        PruneConfig(method="slimgpt", search=SearchConfig(sensitivity_levels=0))
