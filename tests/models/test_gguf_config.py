"""Llama 3's rope scaling is recovered from the factors that a GGUF file has."""

import numpy as np
import pytest
from gguf_files import SIZES, load_model, logits_of, random_model, write_model

from discover_jax.exceptions import WeightsError
from discover_jax.models import import_gguf
from discover_jax.models.gguf_config import llama3_factors, recover_llama3_scaling

pytestmark = pytest.mark.usefixtures("torch", "transformers")


def _transformers_factors(head_size, theta, scaling):
    """The divisors of the rotary frequencies in transformers."""
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(head_dim=head_size, max_position_embeddings=131_072, rope_parameters={"rope_theta": theta, **scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    return 1 / (theta ** (torch.arange(0, head_size, 2) / head_size)) / scaled


@pytest.mark.parametrize(
    ("factor", "low", "high", "length"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (8.0, 2.0, 6.0, 4096), (4.0, 1.0, 8.0, 2048)],
)
@pytest.mark.parametrize("head_size", [64, 128])
def test_llama3_scaling_is_recovered_from_its_factors(head_size, factor, low, high, length):
    given = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    factors = _transformers_factors(head_size, 500_000.0, given).numpy()
    np.testing.assert_allclose(llama3_factors(head_size, 500_000.0, given), factors, rtol=1e-5)
    recovered = recover_llama3_scaling(factors, 500_000.0)
    assert recovered is not None
    np.testing.assert_allclose(_transformers_factors(head_size, 500_000.0, recovered), factors, rtol=1e-5)
    if low == 1:
        assert recovered == given
    assert isinstance(recovered["original_max_position_embeddings"], int)


def test_llama3_scaling_reaches_the_folder(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("llama", rope_parameters={"rope_theta": 500_000.0, **scaling})
    factors = _transformers_factors(SIZES["head_dim"], 500_000.0, scaling).numpy()
    source = write_model(
        tmp_path / "model.gguf",
        model,
        "llama",
        metadata={"llama.rope.freq_base": 500_000.0},
        tensors={"rope_freqs.weight": factors},
    )
    assert import_gguf.import_gguf(source, tmp_path / "out").config["rope_scaling"] == scaling
    np.testing.assert_array_equal(logits_of(load_model(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize(("length", "remarked"), [(131_072, True), (8192, False)])
def test_early_conversion_of_llama_3_1_is_remarked(length, remarked, tmp_path):
    metadata = {"llama.rope.freq_base": 500_000.0, "llama.context_length": length}
    source = write_model(tmp_path / "model.gguf", random_model("llama"), "llama", metadata=metadata)
    remarks = import_gguf.import_gguf(source, tmp_path / "out").remarks
    assert any("no rope_freqs.weight" in remark for remark in remarks) is remarked


def test_factors_of_another_scaling_are_an_error(tmp_path):
    factors = np.array([1, 1, 1.5, 1.2, 3, 2, 8, 8], np.float32)
    assert recover_llama3_scaling(factors, 10_000.0) is None
    source = write_model(tmp_path / "model.gguf", random_model("llama"), "llama", tensors={"rope_freqs.weight": factors})
    with pytest.raises(WeightsError, match=r"rope_freqs.weight.*Supported rope scalings: none and llama3"):
        import_gguf.import_gguf(source, tmp_path / "out")
