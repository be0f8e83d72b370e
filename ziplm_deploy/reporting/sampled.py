"""What a report says of text that was sampled from the dense model, in place of data."""

from __future__ import annotations

from ziplm_deploy.recipe import Recipe
from ziplm_deploy.recovery.self_data import SampledTexts
from ziplm_deploy.reporting.records import SampledText


def sampled_text(recipe: Recipe, texts: SampledTexts | None) -> SampledText | None:
    """What was sampled, and what it serves; None where all data were given."""
    data = recipe.data
    if data.generated is None or texts is None:
        return None
    trains = recipe.recover.mode != "none"
    serves = {"calibration": data.is_generated("calibration"), "training": trains and data.is_generated("train")}
    return SampledText.model_validate(
        {
            "n_texts": len(texts.ids),
            "n_tokens": texts.n_tokens,
            "seconds": texts.seconds,
            "serves": [name for name, is_served in serves.items() if is_served],
            "seed": recipe.seed,
            "settings": data.generated,
        }
    )


def sampled_sentence(sampled: SampledText) -> str:
    """Which data are no data but the dense model's own text, and how that was sampled."""
    settings = sampled.settings
    begins = {
        "vocabulary": "a token drawn from the whole vocabulary",
        "model": "a token drawn as the model begins texts",
    }[settings.first_token]
    greedy = f", goes on with the {settings.greedy_tokens} likeliest" if settings.greedy_tokens else ""
    return (
        f"No text was given for {' and '.join(sampled.serves)}: it was sampled from the dense model. "
        f"{sampled.n_texts:,} texts, {sampled.n_tokens:,} tokens, in {sampled.seconds:.1f} s "
        f"({sampled.n_tokens / sampled.seconds:.0f} tokens a second). Each begins with {begins}{greedy}, and then with "
        f"tokens drawn at temperature {settings.temperature:g}, top-p {settings.top_p:g} (seed {sampled.seed}). The "
        "text is plain, with no chat template around it."
    )
