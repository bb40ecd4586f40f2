import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.hypernetwork.peft_format import AdapterError, validate_adapter


@pytest.fixture
def shapes(smolvlm_dir):
    return BaseShapes.read(smolvlm_dir)


@pytest.fixture
def adapter(make_lora, tmp_path):
    directory = shutil.copytree(make_lora(rank=8, seed=0, dtype=torch.bfloat16), tmp_path / "adapter")
    reconfigure(directory, target_modules=["down_proj"])
    return directory


def rewrite(directory, change):
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def reconfigure(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_good_adapter_passes(adapter, shapes):
    files = validate_adapter(adapter, shapes, max_rank=8)
    assert (files.rank, files.modules) == (8, ("down_proj",))
    assert files.bytes == (adapter / "adapter_model.safetensors").stat().st_size


def test_shapes_agree_with_the_model_itself(shapes, smolvlm_dir):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(smolvlm_dir)
    layer = model.model.text_model.layers[0]
    for module, (d_in, d_out) in shapes.modules.items():
        block = layer.mlp if hasattr(layer.mlp, module) else layer.self_attn
        assert tuple(getattr(block, module).weight.shape) == (d_out, d_in)
    assert shapes.layers == len(model.model.text_model.layers)


def test_a_key_that_would_attach_to_nothing_is_refused(adapter, shapes):
    rewrite(adapter, lambda tensors: {k.replace("model.model.model", "model.model"): v for k, v in tensors.items()})
    with pytest.raises(AdapterError, match="unexpected keys"):
        validate_adapter(adapter, shapes)


def test_a_missing_layer_is_refused(adapter, shapes):
    rewrite(adapter, lambda tensors: {k: v for k, v in tensors.items() if ".layers.2." not in k})
    with pytest.raises(AdapterError, match="missing keys"):
        validate_adapter(adapter, shapes)


def test_a_wrong_shape_is_refused(adapter, shapes):
    rewrite(adapter, lambda tensors: {k: v[:4].contiguous() if "lora_A" in k else v for k, v in tensors.items()})
    with pytest.raises(AdapterError, match="has shape"):
        validate_adapter(adapter, shapes)


def test_values_that_are_not_finite_are_refused(adapter, shapes):
    rewrite(adapter, lambda tensors: {k: v / 0 for k, v in tensors.items()})
    with pytest.raises(AdapterError, match="not finite"):
        validate_adapter(adapter, shapes)


def test_fp32_is_refused(adapter, shapes):
    rewrite(adapter, lambda tensors: {k: v.float() for k, v in tensors.items()})
    with pytest.raises(AdapterError, match="bfloat16"):
        validate_adapter(adapter, shapes)


def test_a_scale_outside_the_weights_is_refused(adapter, shapes):
    reconfigure(adapter, lora_alpha=16)
    with pytest.raises(AdapterError, match="folded into B"):
        validate_adapter(adapter, shapes)


def test_a_rank_above_the_servers_is_refused(adapter, shapes):
    with pytest.raises(AdapterError, match="--max-lora-rank 8"):
        validate_adapter(adapter, shapes, max_rank=4)


def test_a_rank_the_tensors_contradict_is_refused(adapter, shapes):
    reconfigure(adapter, r=4, lora_alpha=4)
    with pytest.raises(AdapterError, match="has shape"):
        validate_adapter(adapter, shapes)


def test_target_modules_as_a_pattern_are_refused(adapter, shapes):
    reconfigure(adapter, target_modules=".*down_proj")
    with pytest.raises(AdapterError, match="must be a list"):
        validate_adapter(adapter, shapes)


def test_a_broken_file_is_refused(adapter, shapes):
    (adapter / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(AdapterError, match="cannot be read"):
        validate_adapter(adapter, shapes)
    shutil.rmtree(adapter)
    with pytest.raises(AdapterError, match="cannot be read"):
        validate_adapter(adapter, shapes)
