"""A small vision transformer (Dosovitskiy et al. 2021) for small images, of plain linear layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention whose projections are modules of their own, so that each can be sparse."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # [B, heads, tokens, dim / heads]
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, blocks, mean over tokens, linear classifier."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        for what, size, least in (
            ("patch", patch, 1),
            ("dim", dim, 1),
            ("depth", depth, 0),
            ("heads", heads, 1),
            ("hidden", hidden, 1),
        ):
            if type(size) is not int or size < least:
                raise ValueError(
                    f"vit {what}: expected a whole number of at least {least}, got {size!r}"
                )
        if height % patch or width % patch:
            raise ValueError(f"vit: expected sides divisible by {patch}, got {height}x{width}")
        if dim % heads:
            raise ValueError(f"vit: expected dim divisible by {heads} heads, got {dim}")
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        tokens = (height // patch) * (width // patch)
        self.position = nn.Parameter(torch.empty(1, tokens, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position  # [B, tokens, dim]
        return self.fc(self.norm(self.blocks(x)).mean(1))


def vit_small(
    shape: tuple[int, int, int],
    classes: int,
    *,
    patch: int = 4,
    dim: int = 192,
    depth: int = 6,
    heads: int = 3,
    hidden: int = 384,
) -> nn.Module:
    """Images [B, C, H, W] with sides divisible by `patch` to scores [B, classes].

    Errors: ValueError for other sides, a size that is no whole number or below its least, a dim that `heads` does not
    divide.
    """
    return ViT(shape, classes, patch, dim, depth, heads, hidden)
