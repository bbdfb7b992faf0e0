"""The paper's ablations as settings."""

from __future__ import annotations

from hpa_ext.hide.config import HiDeConfig

FUSION_COEFFICIENTS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
TEMPERATURES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)


def ablations(layers: int, base: HiDeConfig | None = None) -> dict[str, HiDeConfig]:
    """Settings by name, each `base` (the paper's if None) with one thing changed.

    Args:
        layers: decoder layers of the model.

    Table 3: "merge all", "merge lower" (nothing in the top layers), "expand all", "expand lower". Figure 4: "image
    alone", "text alone". Figure 5: "fusion coefficient e". Figure 7: "temperature T". The authors' code: "factors",
    "batch routing", "authors" (both, and the last projector).
    """
    base = HiDeConfig() if base is None else base
    found = {
        "HiDe": base,
        "merge all": base.replace(top_layers=0),
        "merge lower": base.replace(top_role="none"),
        "expand all": base.replace(top_layers=layers),
        "expand lower": base.replace(top_role="none", lower_role="routed"),
        "image alone": base.replace(image_weight=1.0, text_weight=0.0),
        "text alone": base.replace(image_weight=0.0, text_weight=1.0),
        "factors": base.replace(fusion="factors"),
        "batch routing": base.replace(routing="batch"),
        "authors": base.replace(fusion="factors", routing="batch", projector="last"),
    }
    found |= {f"fusion coefficient {value}": base.replace(fusion_coefficients=value) for value in FUSION_COEFFICIENTS}
    found |= {f"temperature {value}": base.replace(temperature=value) for value in TEMPERATURES}
    return found
