"""A LoRA adapter on packed ternary layers: the small model learns to quote one sentence.

    python examples/lora.py --steps 60 --out adapter

The packed weights stay as they are; the adapter has 3 % of their number and a file of its own.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

import bitnet_ops
from bitnet_ops.integrations.peft import adapt_packed_layers

TEXT = "Mr. Darcy took a slice of toast, and observed that it was rather ternary."
PROMPT = "Mr. Darcy took"


def complete(model: PeftModel) -> str:
    """The greedy continuation of the prompt."""
    ids = model.generate(**model.encode(PROMPT), max_new_tokens=24, eos_token_id=())
    return model.tokenizer.decode(ids[0].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    base = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
    model = get_peft_model(base, adapt_packed_layers(config))
    model.print_trainable_parameters()
    print(f"before: {complete(model)}")

    ids = base.encode(TEXT)["input_ids"]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for step in range(arguments.steps):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(str(arguments.out))

    fresh = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    config = adapt_packed_layers(PeftConfig.from_pretrained(str(arguments.out)))
    loaded = PeftModel.from_pretrained(fresh, str(arguments.out), config=config)
    print(f"after: {complete(loaded)}")


if __name__ == "__main__":
    main()
