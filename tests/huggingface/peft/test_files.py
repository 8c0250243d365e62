from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.peft.files import read_files

A = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(folder, **config):
    content = {"peft_type": "LORA", **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file({"a": A}, folder / "adapter_model.safetensors")
    return folder


def test_both_files_are_read(tmp_path):
    files = read_files(write(tmp_path, r=4, target_parameters=["experts.x"]))
    assert files.config["r"] == 4
    assert list(files.parameters) == ["experts.x"]
    assert files.weights == tmp_path / "adapter_model.safetensors"
    np.testing.assert_array_equal(files.tensors["a"], A)
    assert list(read_files(write(tmp_path)).parameters) == []


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "trained biases are not supported"),
        ({"use_qalora": True}, "it is a QALoRA adapter"),
        ({"init_lora_weights": "pissa"}, "let PEFT convert it to a plain LoRA"),
    ],
)
def test_other_adapters_are_refused(tmp_path, config, told):
    with pytest.raises(InputError, match=told) as caught:
        read_files(write(tmp_path, **config))
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_opened(tmp_path):
    write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(InputError, match="a pickle, which is not opened"):
        read_files(tmp_path)


def test_keys_of_a_wrapped_model_are_those_of_save_pretrained(tmp_path):
    folder = write(tmp_path)
    names = {
        "q.lora_A.default.weight": "q.lora_A.weight",
        "q.lora_magnitude_vector.weight": "q.lora_magnitude_vector",
        "e.lora_embedding_B.default": "e.lora_embedding_B",
        "h.modules_to_save.default.weight": "h.weight",
        "n.modules_to_save.weight": "n.weight",
        "t.token_adapter.trainable_tokens_delta.default": (
            "t.token_adapter.trainable_tokens_delta"
        ),
    }
    save_file(dict.fromkeys(names, A), folder / "adapter_model.safetensors")
    assert read_files(folder).tensors.keys() == {*names.values()}
    twice = {"h.modules_to_save.weight": A, "h.weight": A + 1}
    save_file(twice, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"'h\.weight' twice, with different"):
        read_files(folder)


def test_tensors_without_values_are_refused(tmp_path):
    folder = write(tmp_path)
    save_file({"a": A[:0]}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"'a' without values: .* under ZeRO-3"):
        read_files(folder)
