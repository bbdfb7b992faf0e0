"""The tasks' projectors: fused, averaged, the last, routed, or none."""

from __future__ import annotations

import hide_models as hm
import pytest
import torch

from hpa_ext.hide import HiDeConfig, HiDeModel


@pytest.mark.parametrize("how", ["fused", "mean", "last", "routed", "base"])
def test_projectors(how):
    base = hm.llava_of()
    original = hm.state_of(base)
    found = hm.experts(base)
    model = HiDeModel(base, found, hm.anchors_of(base), HiDeConfig(projector=how, fusion_coefficients=0.5))
    name = "model.multi_modal_projector.linear_1.weight"
    start = original[name].double()
    given = [expert.projector[name].double() for expert in found.values()]
    if how == "routed":
        batch = hm.prompts()
        assert len(model.model.model.multi_modal_projector.projectors) == 3
        own = []
        for task in hm.TASKS:
            with model.routed(task):
                own.append(model.model.get_image_features(batch["pixel_values"]).pooler_output)
        weights = model.routing(**batch)
        mixed = [sum(w * own[c][i] for c, w in enumerate(weights[i])) for i in range(4)]
        with model.routed(weights):
            model(**batch)
        assert not torch.allclose(own[0][0], own[1][0], atol=1e-4)
        with model.state.generating(_prompt(model, batch)):
            got = model.model.get_image_features(batch["pixel_values"]).pooler_output
        torch.testing.assert_close(torch.stack(list(got)), torch.stack(mixed), rtol=1e-5, atol=1e-5)
    else:
        expected = {
            "fused": start + 0.5 * sum(value - start for value in given),
            "mean": sum(given) / 3,
            "last": given[-1],
            "base": start,
        }[how]
        torch.testing.assert_close(base.state_dict()[name].double(), expected, rtol=1e-6, atol=1e-7)
    hm.assert_same_state(model.unload(), original)


def _prompt(model, batch):
    from hpa_ext.hide.prompts import prompt_of

    return prompt_of(model.model, batch)
