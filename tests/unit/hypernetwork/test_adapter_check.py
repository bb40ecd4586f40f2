"""An adapter that does nothing, too much, or is not finite is told from one that took."""

import pytest

from f2l_vllm import models
from f2l_vllm.hypernetwork.adapter import Adapter
from f2l_vllm.hypernetwork.adapter_check import LARGEST_NORM, LEAST_EFFECT, AdapterCheck
from f2l_vllm.hypernetwork.internalizer import Internalizer
from tests.support.videos import write_video


@pytest.fixture(scope="module")
def shipped():
    return Internalizer.load(models.resolve("f2l-tiny"), models.resolve_hypernetwork("f2l-tiny", None))


@pytest.fixture(scope="module")
def proof(shipped):
    return AdapterCheck(shipped.model, shipped.processor.tokenizer)


@pytest.fixture(scope="module")
def good(shipped, tmp_path_factory):
    return shipped.internalize(write_video(tmp_path_factory.mktemp("video") / "a.mp4"))


def scaled(adapter, a=1.0, b=1.0):
    return Adapter({name: (x * a, y * b) for name, (x, y) in adapter.factors.items()}, adapter.scale)


def test_the_shipped_models_adapters_are_far_inside_the_bounds(proof, good):
    finding = proof.check(good)
    assert 100 * LEAST_EFFECT < finding.effect < 2
    assert 0.3 < finding.norm < LARGEST_NORM / 10


def test_the_norm_is_that_of_the_product(proof, good):
    exact = 0.0
    for a_LRI, b_LRO in good.factors.values():
        for layer in range(good.num_layers):
            weight = proof._model.model.text_model.layers[layer].mlp.down_proj.weight.float()
            product = good.scale * b_LRO[layer].float().T @ a_LRI[layer].float()
            exact = max(exact, (product.norm() / weight.norm()).item())
    assert proof.check(good).norm == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("factors", [(0.0, 1.0), (1.0, 0.0), (1e-9, 1.0)])
def test_without_effect(proof, good, factors):
    with pytest.raises(ValueError, match="those of the base model"):
        proof.check(scaled(good, *factors))


def test_too_large(proof, good):
    with pytest.raises(ValueError, match="answers would be noise"):
        proof.check(scaled(good, b=1000.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(proof, good, value):
    broken = scaled(good)
    next(iter(broken.factors.values()))[0][1, 0, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        proof.check(broken)
