"""A vision transformer of plain PyTorch modules becomes ternary: replaced, trained, packed, saved, loaded.

    python examples/vision_transformer.py --steps 150

The images are made here: noisy stripes, vertical or horizontal, narrow or wide.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_ops import BitLinear, BitLinearQAT, pack, replace_linear


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm. All four projections are nn.Linear.

    torch's nn.MultiheadAttention never calls its projections, so there they could not be replaced.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Classes of 16 x 16 images, cut into patches of 4 x 4."""

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, classes: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 16, width) / 10)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Noisy images [count, 1, 16, 16] and their classes [count]."""
    labels = torch.randint(4, (count,))
    x = torch.arange(16)
    wide, narrow = (x // 4 % 2) * 2.0 - 1, (x // 2 % 2) * 2.0 - 1
    rows = torch.stack([wide, narrow])[labels % 2]
    images = torch.where((labels < 2)[:, None, None], rows[:, None, :], rows[:, :, None])
    return (images + torch.randn(count, 16, 16)).unsqueeze(1), labels


def inner_layers(name: str, layer: nn.Module) -> bool:
    """All but the classifier, which has few weights and decides much."""
    return name != "head"


def size(model: nn.Module) -> int:
    """Bytes of the model's file."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("vision_transformer.pt"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = replace_linear(VisionTransformer(), BitLinearQAT, filter=inner_layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(arguments.steps):
        images, labels = stripes(32)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    images, labels = stripes(1000)
    print(f"trained: {accuracy(model, images, labels):.1%} right, {size(model):,} bytes")
    pack(model)
    print(f"packed:  {accuracy(model, images, labels):.1%} right, {size(model):,} bytes")
    torch.save(model.state_dict(), arguments.out)

    fresh = replace_linear(VisionTransformer(), BitLinear, filter=inner_layers)
    fresh.load_state_dict(torch.load(arguments.out, weights_only=True))
    assert torch.equal(fresh(images), model(images))
    print(f"loaded:  {accuracy(fresh, images, labels):.1%} right")


if __name__ == "__main__":
    main()
