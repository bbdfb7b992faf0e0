"""The public names of HiDe with the signatures that users rely on."""

from __future__ import annotations

import inspect

import hide_models as hm
import torch

import hpa_ext
from hpa_ext.ops import routed_lora


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_signatures():
    hide = hpa_ext.hide
    config = inspect.signature(hide.HiDeConfig).parameters
    assert {name: config[name].default for name in list(config)[:6]} == {
        "top_layers": 1, "image_weight": 0.5, "text_weight": 0.5, "temperature": 0.1, "fusion": "delta",
        "routing": "sample",
    }  # fmt: skip
    assert parameters(hide.HiDeModel)[:4] == ["base", "adapters", "anchors", "config"]
    assert parameters(hide.Anchors.update) == ["self", "task", "image_features", "text_features"]
    assert parameters(hide.Anchors.route)[:4] == ["self", "image_features", "text_features", "config"]
    assert parameters(routed_lora) == ["x", "a", "b", "weights", "scaling"]
    assert parameters(hide.linear_cka) == ["x", "y"]


def test_the_contract_in_use():
    config = hpa_ext.hide.HiDeConfig(1, 0.5, 0.5, 0.1, "delta", "sample")
    anchors = hpa_ext.hide.Anchors()
    for task in ("z", "a", "m"):
        anchors.update(task, image_features=torch.randn(3, 5), text_features=torch.randn(3, 7))
    assert anchors.tasks == ["z", "a", "m"]
    weights = anchors.route(image_features=torch.randn(4, 5), text_features=torch.randn(4, 7), config=config)
    assert weights.shape == (4, 3)
    y = routed_lora(torch.randn(4, 6, 8), torch.randn(3, 2, 8), torch.randn(3, 9, 2), weights, torch.ones(3))
    assert y.shape == (4, 6, 9)
    assert hpa_ext.hide.linear_cka(torch.randn(10, 3), torch.randn(10, 5)).shape == ()
    base = hm.llava_of()
    model = hpa_ext.hide.HiDeModel(base, hm.experts(base), hm.anchors_of(base), config)
    assert model.routing(**hm.prompts()).shape == (4, 3)
