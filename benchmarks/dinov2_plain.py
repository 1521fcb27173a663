"""DINOv2 in 3D as its paper's formulas read, nothing saved: the peer of dinov2_a and dinov2_b.

The library's Primus at two crop sizes (positions interpolated, rotary positions of each grid), two class-attention blocks that
sum up its tokens (starting from their mean), separate DINO and iBOT heads. As public implementations do, the iBOT head sees ALL
tokens of the global crops, of student and teacher, and masked tokens are selected from its (tokens, prototypes) logits. Sinkhorn
in the exponential domain, log_softmax over all prototypes, AdamW, clipping of the whole gradient, a momentum teacher updated
parameter by parameter. Network, crops, masks and losses are those of DINOv2Trainer, without what its batch sizes here leave out
(KoLeo).

Source: Oquab et al. 2023, arXiv:2304.07193; Zhou et al. 2021, arXiv:2111.07832; Touvron et al. 2021, arXiv:2103.17239 (class attention).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.primus import Primus
from einops import rearrange
from timm.layers import RotaryEmbeddingCat
from torch import Tensor, nn

STUDENT_TEMPERATURE = 0.1


class PlainClassAttention(nn.Module):
    """A transformer block whose only query is the class token; it attends to itself and to the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        every = self.norm1(torch.cat((query, tokens), 1))
        k, v = self.kv(every).chunk(2, -1)
        q, k, v = (rearrange(x, "b n (h c) -> b h n c", h=self.heads) for x in (self.q(every[:, :1]), k, v))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n c -> b n (h c)")
        query = query + self.gamma_1 * self.proj(attended)
        return query + self.gamma_2 * self.mlp(self.norm2(query))


class PlainEncoder(nn.Module):
    """Primus for cubic crops of any size, with a mask token: patch tokens (B, N, C) and their summary (B, C)."""

    def __init__(self, size: int, token: int, width: int, depth: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.net = Primus(1, width, (token,) * 3, 1, depth, heads, (size,) * 3, drop_path_rate=drop_path, init_values=0.1, scale_attn_inner=True)
        self.net.up_projection = nn.Identity()
        self.grid = (size // token,) * 3
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.layers = nn.ModuleList(PlainClassAttention(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        eva = self.net.eva
        embedded = self.net.down_projection(image)
        grid = embedded.shape[2:]
        tokens = rearrange(embedded, "b c z y x -> b (z y x) c")
        if mask is not None:
            tokens = torch.where(mask.flatten(1)[..., None], self.mask_token, tokens)
        tokens = tokens + self.positions(grid)
        rotary = RotaryEmbeddingCat(eva.rope.dim, in_pixels=False, feat_shape=list(grid), ref_feat_shape=list(grid)).get_embed()
        for block in eva.blocks:
            tokens = block(tokens, rope=rotary)
        tokens = eva.norm(tokens)
        query = self.query + tokens.mean(1, keepdim=True)
        for layer in self.layers:
            query = layer(query, tokens)
        return tokens, self.norm(query[:, 0])

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Learned positions (1, N, C) of a token grid."""
        z, y, x = self.grid
        volume = rearrange(self.net.eva.pos_embed, "b (z y x) c -> b c z y x", z=z, y=y, x=x)
        if tuple(grid) != self.grid:
            volume = F.interpolate(volume, size=tuple(grid), mode="trilinear", align_corners=False)
        return rearrange(volume, "b c z y x -> b (z y x) c")


class PlainHead(nn.Module):
    """Three-layer MLP to the unit sphere, cosines to the prototypes: (n, width) -> (n, prototypes)."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=1), F.normalize(self.prototypes, dim=1))


class PlainNetwork(nn.Module):
    """Encoder and heads: what student and teacher are."""

    def __init__(self, encoder: PlainEncoder, dino_head: PlainHead, ibot_head: PlainHead) -> None:
        super().__init__()
        self.encoder, self.dino_head, self.ibot_head = encoder, dino_head, ibot_head


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments (n, K) with rows that sum to 1 and nearly equal columns."""
    q = (logits / temperature).exp()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
    return q * q.shape[0]


class PlainDINOv2:
    """Student, teacher, centre of the CLS logits, optimiser."""

    def __init__(self, student: PlainNetwork, prototypes: int, *, temperature: float, momentum: float = 0.992, lr: float = 1e-4) -> None:
        self.student, self.teacher = student.train(), copy.deepcopy(student).requires_grad_(False).eval()
        self.centre = torch.zeros(prototypes)
        self.temperature, self.momentum = temperature, momentum
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.04)

    def losses(self, global_crops: Tensor, local_crops: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """DINO and iBOT loss.

        Args:
            global_crops: (2 B, 1, z, y, x), the first crop of every sample, then the second one.
            local_crops: (L B, 1, z, y, x), in the same order.
            mask: (2 B, d, h, w) bool, True = hidden from the student.
        """
        with torch.no_grad():
            tokens, cls = self.teacher.encoder(global_crops)
            teacher_cls = self.teacher.dino_head(cls)
            teacher_patches = self.teacher.ibot_head(tokens.flatten(0, 1))
        tokens, cls = self.student.encoder(global_crops, mask)
        _, local_cls = self.student.encoder(local_crops)
        student_cls = self.student.dino_head(torch.cat((cls, local_cls)))
        student_patches = self.student.ibot_head(tokens.flatten(0, 1))
        return self.dino(student_cls, teacher_cls), self.ibot(student_patches, teacher_patches, mask.flatten(1))

    def dino(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Every view of the student against both global crops of the teacher, but a crop not against itself."""
        samples = len(teacher) // 2
        targets = ((teacher - self.centre) / self.temperature).softmax(1).split(samples)
        self.centre = 0.9 * self.centre + 0.1 * teacher.mean(0)
        views = (student / STUDENT_TEMPERATURE).log_softmax(1).split(samples)
        pairs = [-(t * s).sum(1).mean() for i, t in enumerate(targets) for j, s in enumerate(views) if i != j]
        return torch.stack(pairs).sum() / len(pairs)

    def ibot(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Masked tokens of the student against those of the teacher: mean over a crop's tokens, then over all crops."""
        hidden = mask.flatten()
        targets = sinkhorn(teacher[hidden], self.temperature)
        entropies = -(targets * (student[hidden] / STUDENT_TEMPERATURE).log_softmax(1)).sum(1)
        weights = (1 / mask.sum(1).clamp(min=1))[:, None].expand_as(mask).flatten()[hidden]
        return (entropies * weights).sum() / len(mask)

    def step(self, global_crops: Tensor, local_crops: Tensor, mask: Tensor) -> None:
        """One optimiser step."""
        dino, ibot = self.losses(global_crops, local_crops, mask)
        self.optimizer.zero_grad()
        (dino + ibot).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters()):
                mine.mul_(self.momentum).add_(theirs, alpha=1 - self.momentum)
