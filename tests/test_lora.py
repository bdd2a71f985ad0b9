"""LoRA adapters of peft beside packed layers: they train, the base stays, a file brings them back."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from text_models import tiny_model
from torch import Tensor

import bitnet_ops
from bitnet_ops import BitLinear, BitNet, KVCache

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's, which peft imports where it is installed
    from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model

    from bitnet_ops.integrations.peft import LoraBitLinear, adapt_packed_layers

EXAMPLE = Path(__file__).parent.parent / "examples/lora.py"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Products this small lose more to handing out work than they gain."""
    torch.set_num_threads(1)


def adapted(model: BitNet, **options: object) -> PeftModel:
    config = LoraConfig(**{"r": 4, "target_modules": PROJECTIONS} | options)
    return get_peft_model(model, adapt_packed_layers(config))


def train(model: PeftModel, ids: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("training", [False, True])
def test_the_default_model_learns_and_its_packed_weights_stay(training: bool, tmp_path: Path) -> None:
    base = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ids = base.encode("Mr. Darcy took a slice of toast, and observed that it was ternary.")["input_ids"]
    with torch.no_grad():
        plain = base(ids)

    model = adapted(base)
    packed = [m for m in model.modules() if isinstance(m, LoraBitLinear)]
    assert len(packed) == len(PROJECTIONS) * base.config.num_hidden_layers
    model.train(training)
    losses = train(model, ids, steps=25)
    assert losses[-1] < 0.5 * losses[0]
    model.eval()

    # Nothing but the adapter has changed, and without it the outputs are those of before, bit for bit.
    for name, tensor in base.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace("base_layer.", "")]), name
    with torch.no_grad():
        tuned = model(ids)
        with model.disable_adapter():
            assert torch.equal(model(ids), plain)
    assert not torch.equal(tuned, plain)

    model.save_pretrained(str(tmp_path / "adapter"))
    config = adapt_packed_layers(PeftConfig.from_pretrained(str(tmp_path / "adapter")))
    fresh = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"), config=config)
    with torch.no_grad():
        assert torch.equal(loaded(ids), tuned)
    unloaded = loaded.unload()
    assert not any(isinstance(m, LoraBitLinear) for m in unloaded.modules())
    with torch.no_grad():
        assert torch.equal(unloaded(ids), plain)


def test_fused_paths_step_aside_for_adapters() -> None:
    base = tiny_model(eos=None)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base(ids, cache=KVCache(base.config, 1, 16))  # collects the layers for one operator
        plain = base(ids, cache=KVCache(base.config, 1, 16))
        model = adapted(base, init_lora_weights="gaussian")
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "gate_proj" in name:
                parameter.fill_(0.1)
        cached = model(ids, cache=KVCache(base.config, 1, 16))
        assert not torch.equal(cached, plain)
        # The same products and sums: with float32, attention to a cache gives the bits of the one without.
        assert torch.equal(cached, model(ids))


def test_a_base_in_any_layout() -> None:
    base = tiny_model(eos=None)
    results = []
    for layout in bitnet_ops.packing.LAYOUTS:
        torch.manual_seed(1)
        model = adapted(bitnet_ops.repack(tiny_model(eos=None), layout), init_lora_weights=False)
        results.append(model(torch.tensor([[1, 2, 3]])))
    assert all(torch.equal(result, results[0]) for result in results)
    assert not torch.equal(results[0], base(torch.tensor([[1, 2, 3]])))


def test_what_needs_float_weights_is_refused() -> None:
    model = adapted(tiny_model())
    with pytest.raises(RuntimeError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=r"init_lora_weights: expected True, False or 'gaussian'.*'pissa'"):
        adapted(tiny_model(), init_lora_weights="pissa")
    with pytest.raises(ValueError, match="use_dora"):
        adapted(tiny_model(), use_dora=True)
    with pytest.raises(TypeError, match=r"config: expected a peft\.LoraConfig, got PromptTuningConfig"):
        adapt_packed_layers(PromptTuningConfig())


def test_layers_say_where_they_live() -> None:
    layer = BitLinear(8, 8, device="meta")
    assert layer.qweight is layer.packed_weight
    assert "qweight" not in layer.state_dict()


@pytest.mark.slow
def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "30"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    before, after = (
        text.split(": ", 1)[1] for text in capsys.readouterr().out.split("\n") if ": Mr." in text
    )
    sentence = "Mr. Darcy took a slice of toast, and observed that it was rather ternary."
    assert not before.startswith(sentence)
    assert after.startswith(sentence)
