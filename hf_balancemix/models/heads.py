"""A hidden layer on pooled features; ML-Decoder, Query2Label and MS-CMA on maps. Remote code has it too: torch only.

The decoders' submodules are named as in the references, so that published state dicts load by their own key names.
Their layers are written out, because `nn.TransformerDecoder` refuses layers without self-attention since torch 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLPHead(nn.Sequential):
    """A hidden layer with ReLU on pooled features, and a linear layer on it.

    Args:
        in_channels, num_labels: C, channels of the features, and K.
        hidden_size: Units of the hidden layer, 1 or more; else a ValueError.

    Shapes: `(N, C)` -> logits `(N, K)`.
    """

    def __init__(self, in_channels: int, num_labels: int, hidden_size: int = 256) -> None:
        if hidden_size < 1:
            raise ValueError(f"hidden_size is {hidden_size}; it must be 1 or more; without one take the head linear.")
        super().__init__(nn.Linear(in_channels, hidden_size), nn.ReLU(), nn.Linear(hidden_size, num_labels))

    def reset_parameters(self) -> None:
        _reset_layers(self)


class _Layer(nn.Module):
    """What the three post-norm transformer layers share: all parts, by the names of the references."""

    attention = "multihead_attn"
    norms: tuple[int, ...]

    def __init__(self, dim: int, num_heads: int, inner_dim: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim is {dim}; it must be a multiple of num_heads, {num_heads}; change either.")
        self.linear1 = nn.Linear(dim, inner_dim)
        self.linear2 = nn.Linear(inner_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.add_module(self.attention, nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True))
        for number in self.norms:
            self.add_module(f"norm{number}", nn.LayerNorm(dim))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))


class _MLDecoderLayer(_Layer):
    norms = (1, 2, 3)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        x = self.norm1(queries + self.dropout(queries))
        attended, _ = self.multihead_attn(x, memory, memory, need_weights=False)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))


class MLDecoderHead(nn.Module):
    """ML-Decoder (Ridnik et al., WACV 2023): group queries attend to the features, each query serves F classes.

    With E = min(K, 100 if `num_groups` < 0 else `num_groups`) queries, F = ceil(K / E): logit e F + f is the inner
    product of query e's output with its f-th vector, plus the class's bias. One layer, 8 heads of attention, no
    self-attention, no positional encoding.

    Args:
        in_channels: C, channels of the features.
        num_labels: K.
        num_groups: Queries; negative: 100. Never more than K.
        embed_dim: D, width of the decoder.
        trainable_queries: The reference keeps the queries as they were drawn, N(0, 1); True trains them.
        num_heads, inner_dim, dropout: Of the decoder layer.

    Shapes: a map `(N, C, H, W)` or a sequence `(N, T, C)`, of any size -> logits `(N, K)`.

    Raises:
        ValueError: `num_groups` is 0, or `embed_dim` is no multiple of `num_heads`.
    """

    def __init__(
        self,
        in_channels: int,
        num_labels: int,
        num_groups: int = -1,
        embed_dim: int = 768,
        trainable_queries: bool = False,
        num_heads: int = 8,
        inner_dim: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_groups == 0:
            raise ValueError("num_groups is 0; it must be a number of queries, or -1; leave it out for 100 queries.")
        num_queries = min(100 if num_groups < 0 else num_groups, num_labels)
        self.num_labels = num_labels
        # Named as in the reference, its spelling included.
        self.decoder = nn.Module()
        self.decoder.embed_standart = nn.Linear(in_channels, embed_dim)
        self.decoder.query_embed = nn.Embedding(num_queries, embed_dim)
        self.decoder.query_embed.requires_grad_(trainable_queries)
        self.decoder.layers = nn.ModuleList([_MLDecoderLayer(embed_dim, num_heads, inner_dim, dropout)])
        # Rounded up by integers; the reference's int(K / E + 0.999) is wrong for K = 10,001 and E = 10,000.
        classes_per_query = -(-num_labels // num_queries)
        self.decoder.duplicate_pooling = nn.Parameter(torch.empty(num_queries, embed_dim, classes_per_query))
        self.decoder.duplicate_pooling_bias = nn.Parameter(torch.empty(num_labels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset_layers(self)
        nn.init.normal_(self.decoder.query_embed.weight)
        nn.init.xavier_normal_(self.decoder.duplicate_pooling)
        nn.init.zeros_(self.decoder.duplicate_pooling_bias)

    def forward(self, features: Tensor) -> Tensor:
        sequence = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        memory = F.relu(self.decoder.embed_standart(sequence))
        x = self.decoder.query_embed.weight.expand(len(memory), -1, -1)
        for layer in self.decoder.layers:
            x = layer(x, memory)
        logits = torch.einsum("ned,edf->nef", x, self.decoder.duplicate_pooling).flatten(1)
        return logits[:, : self.num_labels] + self.decoder.duplicate_pooling_bias


class _Q2LEncoderLayer(_Layer):
    attention, norms = "self_attn", (1, 2)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        placed = x + position
        attended, _ = self.self_attn(placed, placed, x, need_weights=False)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.feed_forward(x))


class _Q2LDecoderLayer(_Layer):
    norms = (2, 3)  # norm1 went with the self-attention

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        attended, _ = self.multihead_attn(x + queries, memory + position, memory, need_weights=False)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))


class Query2LabelHead(nn.Module):
    """Query2Label (Liu et al., 2021): a query a class attends to the encoded feature map.

    One encoder layer (position added to query and key), two decoder layers without self-attention, post-norm; the
    logit of class k is <W_k, t_k> + b_k. The sine position encoding is made for the map at hand, so that any image
    size will do; the reference fixes it.

    Args:
        in_channels: C, channels of the features.
        num_labels: K.
        embed_dim: D; None takes C without a projection, as the published runs do.
        num_heads, inner_dim, dropout, encoder_layers, decoder_layers: Of the transformer.

    Shapes: a map `(N, C, H, W)` -> logits `(N, K)`.

    Raises:
        ValueError: D is no multiple of 4 or of `num_heads`.
    """

    def __init__(
        self,
        in_channels: int,
        num_labels: int,
        embed_dim: int | None = None,
        num_heads: int = 4,
        inner_dim: int = 8192,
        dropout: float = 0.1,
        encoder_layers: int = 1,
        decoder_layers: int = 2,
    ) -> None:
        super().__init__()
        dim = embed_dim or in_channels
        if dim % 4:
            raise ValueError(
                f"Query2Label's width is {dim}; it must be a multiple of 4 for the position encoding; set embed_dim."
            )
        self.input_proj = nn.Conv2d(in_channels, dim, 1) if embed_dim else nn.Identity()
        self.query_embed = nn.Embedding(num_labels, dim)
        self.transformer = nn.Module()
        self.transformer.encoder, self.transformer.decoder = nn.Module(), nn.Module()
        arguments = (dim, num_heads, inner_dim, dropout)
        self.transformer.encoder.layers = nn.ModuleList(_Q2LEncoderLayer(*arguments) for _ in range(encoder_layers))
        self.transformer.decoder.layers = nn.ModuleList(_Q2LDecoderLayer(*arguments) for _ in range(decoder_layers))
        self.transformer.decoder.norm = nn.LayerNorm(dim)
        self.fc = nn.Module()
        self.fc.W = nn.Parameter(torch.empty(1, num_labels, dim))
        self.fc.b = nn.Parameter(torch.empty(1, num_labels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset_layers(self)
        for parameter in self.transformer.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.query_embed.weight)
        bound = self.fc.W.shape[-1] ** -0.5
        nn.init.uniform_(self.fc.W, -bound, bound)
        nn.init.uniform_(self.fc.b, -bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        source = self.input_proj(features)
        position = sine_positions(source.shape[2], source.shape[3], source.shape[1], source).flatten(1).t()
        memory = source.flatten(2).transpose(1, 2)
        for layer in self.transformer.encoder.layers:
            memory = layer(memory, position)
        queries = self.query_embed.weight
        x = queries.new_zeros(()).expand(len(memory), *queries.shape)
        for layer in self.transformer.decoder.layers:
            x = layer(x, queries, memory, position)
        x = self.transformer.decoder.norm(x)
        return (self.fc.W * x).sum(-1) + self.fc.b


class MSCMAHead(nn.Module):
    """MS-CMA (You et al., AAAI 2020): each class attends to the places of several maps that look like its embedding.

    In every map, 1 x 1 convolutions make v_i of D channels of place i (CMT). With z_ki = ReLU(cos(v_i, e_k)) and P
    places, a_ki = (z_ki + eps / P) / (sum_i z_ki + eps) is the attention of class k and h_k = sum_i a_ki v_i (CMA).
    The logit of class k is <w_k, h_k> + b_k, where h_k is that of all maps, joined. eps is 1e-3: a class that no place
    looks like sees the mean of all places. The rest is of the description, which has no published code;
    docs/choices.md says what it leaves open.

    Args:
        in_channels: C_s, channels of each map s.
        num_labels: K.
        embed_dim: D, 1 or more.

    Attributes:
        label_embeddings: Buffer `(K, D)`, e_k: made of the training labels by
            `hf_balancemix.models.label_graph_embeddings`, not trained, saved with the weights. 0 until it is set: all
            places count the same.

    Shapes: a list of maps `(N, C_s, H_s, W_s)`, of any sizes -> logits `(N, K)`.

    Raises:
        ValueError: `embed_dim` is less than 1.
    """

    label_embeddings: Tensor

    def __init__(self, in_channels: Sequence[int], num_labels: int, embed_dim: int = 256) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim is {embed_dim}; it must be 1 or more; leave it out for 256.")
        self.transforms = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, embed_dim, 1), nn.ReLU(), nn.Conv2d(embed_dim, embed_dim, 1))
            for channels in in_channels
        )
        self.weight = nn.Parameter(torch.empty(num_labels, len(self.transforms) * embed_dim))
        self.bias = nn.Parameter(torch.empty(num_labels))
        self.register_buffer("label_embeddings", torch.empty(num_labels, embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the layers as torch does, and forget the label embeddings."""
        _reset_layers(self)
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.label_embeddings)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        seen = []
        for transform, features in zip(self.transforms, maps, strict=True):
            places = transform(features).flatten(2)  # (N, D, P)
            attention = cross_modality_attention(places, self.label_embeddings)
            seen.append(attention.to(places.dtype) @ places.transpose(1, 2))
        return (self.weight * torch.cat(seen, dim=-1)).sum(-1) + self.bias


def cross_modality_attention(places: Tensor, embeddings: Tensor, eps: float = 1e-3) -> Tensor:
    """`(N, K, P)` attention of K classes with embeddings `(K, D)` to P places `(N, D, P)`, which sums to 1 over them.

    As of :class:`MSCMAHead`; not negative, and finite with finite gradients for any finite input. In float32 at least.
    """
    directions = F.normalize(embeddings, dim=1, eps=1e-6), F.normalize(places, dim=1, eps=1e-6)  # not 0 in float16
    similarity = F.relu(directions[0] @ directions[1])
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    return (similarity + eps / similarity.shape[-1]) / (similarity.sum(-1, keepdim=True) + eps)


def sine_positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """2-D sine position encoding `(channels, height, width)`: the row in the first half, the column in the second.

    DETR's: counted from 1, scaled to 2 pi, temperature 10000. In float32 at least, then `like`'s dtype, on its device.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    half = channels // 2
    frequency = 10_000 ** (torch.arange(0, half, 2, dtype=dtype, device=like.device) / half)

    def encode(length: int) -> Tensor:  # (length, half)
        places = torch.arange(1, length + 1, dtype=dtype, device=like.device) / (length + 1e-6) * 2 * math.pi
        angles = places[:, None] / frequency
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)

    rows = encode(height)[:, None].expand(height, width, half)
    columns = encode(width)[None].expand(height, width, half)
    return torch.cat((rows, columns), dim=-1).permute(2, 0, 1).to(like.dtype)


def _reset_layers(head: nn.Module) -> None:
    """Draw every layer of a head as torch does."""
    layers = [module for module in head.modules() if module is not head]
    for layer in reversed(layers):  # parts first: attention sets the bias of the linear layer in it to 0
        if isinstance(layer, nn.MultiheadAttention):
            layer._reset_parameters()
        elif hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
