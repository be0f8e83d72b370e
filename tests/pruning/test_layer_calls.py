"""Layers run one at a time, with the arguments that the model gives each of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import BLOCK_TYPES, HERE, tiny_causal_model, tiny_inputs, tiny_model
from ziplm_deploy.errors import DataError
from ziplm_deploy.models.adapted import adapted
from ziplm_deploy.models.causal import without_cache
from ziplm_deploy.models.modules import attention_kind, layers_of, prunable_modules
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.layer_calls import capture_calls, input_moments, that_fit

CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox")


def model_of(model_type: str) -> nn.Module:
    return without_cache(tiny_causal_model(model_type)) if model_type in CAUSAL else tiny_model(model_type)


def last_layer_output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the last layer makes when the model is run as a whole."""
    found: list[Tensor] = []
    handle = layers_of(model)[-1].register_forward_hook(
        lambda _module, _args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("model_type", dict.fromkeys((*BLOCK_TYPES, *HERE, "t5", *CAUSAL)))
def test_layers_one_at_a_time_are_the_model(model_type: str) -> None:
    model = model_of(model_type)
    batches = [tiny_inputs(model, 3, 14, seed) for seed in range(2)]
    with torch.no_grad():
        calls, hidden = capture_calls(model, batches)
        for layer in layers_of(model):
            hidden = [call.run(layer, states) for call, states in zip(calls, hidden, strict=True)]
    for states, call, batch in zip(hidden, calls, batches, strict=True):
        expected = last_layer_output(model, batch)
        torch.testing.assert_close(call.tokens(states), call.tokens(expected), atol=1e-5, rtol=1e-4)
        mask = batch.get("attention_mask", torch.ones(states.shape[:2]))
        assert torch.equal(call.mask, mask.bool())
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_layers_with_windows_have_masks_of_their_own(model_type: str) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    model = adapted(without_cache(tiny_causal_model(model_type, **windows)))
    assert [attention_kind(layer) for layer in layers_of(model)] == ["full_attention", *["sliding_attention"] * 2]
    batch = tiny_inputs(model, 3, 14)
    with torch.no_grad():
        (call,), (states,) = capture_calls(model, [batch])
        for layer in layers_of(model):
            states = call.run(layer, states)
    torch.testing.assert_close(call.tokens(states), call.tokens(last_layer_output(model, batch)), atol=1e-5, rtol=1e-4)


def test_every_fifth_example_is_held_out_over_all_batches() -> None:
    model = tiny_model("bert")
    calls, _ = capture_calls(model, [tiny_inputs(model, 3, 6), tiny_inputs(model, 4, 6)])
    examples = torch.cat(
        [torch.arange(3)[:, None].expand(3, 6)[calls[0].mask], torch.arange(3, 7)[:, None].expand(4, 6)[calls[1].mask]]
    )
    assert torch.cat([call.held_out for call in calls]).tolist() == (examples == 4).tolist()


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "modernbert", "vit", "llama", "gpt_neox"])
def test_moments_of_a_layer_alone_are_those_of_a_whole_pass(model_type: str) -> None:
    model = model_of(model_type)
    batches = [tiny_inputs(model, 3, 14, seed) for seed in range(2)]
    expected = collect_statistics(model, batches, prunable_modules(model), memory_limit_bytes=2**30)
    with torch.no_grad():
        calls, hidden = capture_calls(model, batches)
        for index, layer in enumerate(layers_of(model)):
            for module in (each for each in prunable_modules(model) if each.layer == index):
                found = input_moments(model, module, calls, hidden)
                assert found.n_tokens == expected[module.name].n_tokens
                torch.testing.assert_close(found.hessian, expected[module.name].hessian, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found.mean, expected[module.name].mean, rtol=1e-4, atol=1e-5)
            hidden = [call.run(layer, states) for call, states in zip(calls, hidden, strict=True)]


def test_no_tokens_is_a_data_error() -> None:
    model = tiny_model("bert")
    batch = tiny_inputs(model)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with torch.no_grad():
        calls, hidden = capture_calls(model, [batch])
        with pytest.raises(DataError, match=r"0\.attention"):
            input_moments(model, prunable_modules(model)[0], calls, hidden)


def test_a_walk_takes_as_many_batches_as_memory_holds() -> None:
    """Every n-th of batches that are sorted by length, so that no length is left out."""
    model = tiny_model("bert")
    texts = [{"input_ids": torch.zeros(8, length, dtype=torch.long)} for length in range(10, 90)]
    assert that_fit(texts, model) == texts
    hidden_size = model.config.hidden_size  # type: ignore[union-attr]
    whole = sum(4 * 8 * length * (5 * hidden_size + length) for length in range(10, 90))
    assert that_fit(texts, model, whole) == texts
    assert that_fit(texts, model, whole - 1) == texts[::2]
    assert that_fit(texts, model, whole // 4 + 1) == texts[::4]
    assert that_fit(texts, model, 1) == texts[:1]
    images = tiny_model("vit")
    pixels = [tiny_inputs(images, batch_size=4)] * 10
    with torch.no_grad():
        n_states = images.base_model(**pixels[0]).last_hidden_state.numel()  # type: ignore[operator, union-attr]
    assert len(that_fit(pixels, images, 10 * 4 * 5 * n_states)) == 10
    assert len(that_fit(pixels, images, 10 * 4 * 5 * n_states - 1)) == 5
