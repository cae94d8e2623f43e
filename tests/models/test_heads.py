"""Decoder heads against their formulas written with loops, by the references' key names, for any size and any K."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hf_balancemix.models import MLDecoderHead, MSCMAHead, Query2LabelHead
from hf_balancemix.models.heads import cross_modality_attention, sine_positions

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def randomised(head: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter different from its initial value, biases and norms too; float64, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    head = head.double().eval()
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    return head


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


# ---- the formulas, a row at a time ----


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    rows = [(row - row.mean()) / math.sqrt(((row - row.mean()) ** 2).mean() + 1e-5) for row in x]
    return torch.stack(rows) * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(query: Tensor, key: Tensor, value: Tensor, state: dict[str, Tensor], name: str, heads: int) -> Tensor:
    """Queries `(Q, D)` on a sequence `(T, D)`, with explicit loops over heads, queries and places."""
    dim = query.shape[1]
    weight, bias = state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"]
    q = query @ weight[:dim].T + bias[:dim]
    k = key @ weight[dim : 2 * dim].T + bias[dim : 2 * dim]
    v = value @ weight[2 * dim :].T + bias[2 * dim :]
    out, width = torch.zeros_like(q), dim // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(q)):
            scores = [math.exp(float(q[i, part] @ k[j, part]) / math.sqrt(width)) for j in range(len(k))]
            for j in range(len(k)):
                out[i, part] += scores[j] / sum(scores) * v[j, part]
    return out @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def feed_forward(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    inner = (x @ state[f"{name}.linear1.weight"].T + state[f"{name}.linear1.bias"]).clamp(min=0)
    return inner @ state[f"{name}.linear2.weight"].T + state[f"{name}.linear2.bias"]


def ml_decoder(sequence: Tensor, state: dict[str, Tensor], num_labels: int, heads: int = 8) -> list[float]:
    """One image's logits from `(T, C)`; the class k belongs to query k // F and its vector k % F."""
    memory = sequence @ state["decoder.embed_standart.weight"].T + state["decoder.embed_standart.bias"]
    memory = memory.clamp(min=0)
    layer = "decoder.layers.0"
    t0 = norm(2 * state["decoder.query_embed.weight"], state, f"{layer}.norm1")
    t1 = norm(t0 + attention(t0, memory, memory, state, f"{layer}.multihead_attn", heads), state, f"{layer}.norm2")
    t2 = norm(t1 + feed_forward(t1, state, layer), state, f"{layer}.norm3")
    vectors, bias = state["decoder.duplicate_pooling"], state["decoder.duplicate_pooling_bias"]
    per_query = math.ceil(num_labels / len(vectors))
    return [
        sum(float(t2[k // per_query, d] * vectors[k // per_query, d, k % per_query]) for d in range(t2.shape[1]))
        + float(bias[k])
        for k in range(num_labels)
    ]


def q2l(feature_map: Tensor, state: dict[str, Tensor], num_labels: int, heads: int = 4) -> list[float]:
    """One image's logits from `(C, H, W)`."""
    channels, height, width = feature_map.shape
    source = feature_map.permute(1, 2, 0).reshape(height * width, channels)
    if "input_proj.weight" in state:
        source = source @ state["input_proj.weight"][:, :, 0, 0].T + state["input_proj.bias"]
    dim = source.shape[1]
    position = torch.zeros_like(source)
    for y in range(height):
        for x in range(width):
            for d in range(dim):
                half, place, length = (d, y + 1, height) if d < dim // 2 else (d - dim // 2, x + 1, width)
                angle = place / (length + 1e-6) * 2 * math.pi / 10000 ** (2 * (half // 2) / (dim // 2))
                position[y * width + x, d] = math.sin(angle) if half % 2 == 0 else math.cos(angle)
    layer = "transformer.encoder.layers.0"
    placed = source + position
    s = norm(source + attention(placed, placed, source, state, f"{layer}.self_attn", heads), state, f"{layer}.norm1")
    s = norm(s + feed_forward(s, state, layer), state, f"{layer}.norm2")
    queries = state["query_embed.weight"]
    t = torch.zeros_like(queries)
    for i in range(2):
        layer = f"transformer.decoder.layers.{i}"
        mixed = attention(t + queries, s + position, s, state, f"{layer}.multihead_attn", heads)
        t = norm(t + mixed, state, f"{layer}.norm2")
        t = norm(t + feed_forward(t, state, layer), state, f"{layer}.norm3")
    t = norm(t, state, "transformer.decoder.norm")
    return [float(state["fc.W"][0, k] @ t[k] + state["fc.b"][0, k]) for k in range(num_labels)]


def ms_cma(maps: list[Tensor], state: dict[str, Tensor], num_labels: int, eps: float = 1e-3) -> list[float]:
    """One image's logits from maps `(C, H, W)`, a place at a time."""
    embeddings, joined = state["label_embeddings"], [[] for _ in range(num_labels)]
    for s, feature_map in enumerate(maps):
        name, places = f"transforms.{s}", []
        for y in range(feature_map.shape[1]):
            for x in range(feature_map.shape[2]):
                inner = state[f"{name}.0.weight"][:, :, 0, 0] @ feature_map[:, y, x] + state[f"{name}.0.bias"]
                inner = torch.stack([value if value > 0 else value * 0 for value in inner])
                places.append(state[f"{name}.2.weight"][:, :, 0, 0] @ inner + state[f"{name}.2.bias"])
        for k in range(num_labels):
            e = embeddings[k]
            z = [max(0.0, float(v @ e) / math.sqrt(float(v @ v) * float(e @ e))) for v in places]
            shares = [(value + eps / len(places)) / (sum(z) + eps) for value in z]
            joined[k] += sum(share * v for share, v in zip(shares, places, strict=True)).tolist()
    weight, bias = state["weight"], state["bias"]
    return [sum(float(w) * h for w, h in zip(weight[k], joined[k], strict=True)) + float(bias[k])
            for k in range(num_labels)]  # fmt: skip


# ---- agreement ----


@pytest.mark.parametrize(("num_labels", "num_groups"), [(5, -1), (1, -1), (7, 3), (6, 3), (130, -1), (8, 50)], ids=str)
def test_ml_decoder_follows_its_formula(num_labels, num_groups):
    head = randomised(MLDecoderHead(6, num_labels, num_groups, embed_dim=16, inner_dim=12))
    x = features(2, 6, 3, 2)
    expected = [ml_decoder(image.flatten(1).T, head.state_dict(), num_labels) for image in x]
    torch.testing.assert_close(head(x), torch.tensor(expected, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(head(x.flatten(2).transpose(1, 2)), head(x), **EXACT)  # a sequence is as good


@pytest.mark.parametrize("embed_dim", [None, 16])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 1), (1, 4)])
def test_query2label_follows_its_formula_for_any_size(embed_dim, height, width):
    head = randomised(Query2LabelHead(8, 3, embed_dim=embed_dim, inner_dim=10))
    x = features(2, 8, height, width)
    expected = [q2l(image, head.state_dict(), 3) for image in x]
    torch.testing.assert_close(head(x), torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("sizes", [[(3, 2)], [(4, 5), (2, 2), (1, 1)]], ids=["one map", "three maps"])
def test_ms_cma_follows_its_formula_for_any_sizes(sizes):
    channels = [6, 4, 5][: len(sizes)]
    head = randomised(MSCMAHead(channels, 7, embed_dim=3))
    head.label_embeddings.copy_(features(7, 3))
    maps = [features(2, c, *size) + 0.3 for c, size in zip(channels, sizes, strict=True)]
    expected = [ms_cma([m[n] for m in maps], head.state_dict(), 7) for n in range(2)]
    torch.testing.assert_close(head(maps), torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_a_class_attends_to_the_places_that_look_like_it():
    # Three places: like the first class, half like both, like neither.
    places = torch.tensor([[[2.0, 1.0, -1.0], [0.0, 1.0, -1.0]]], dtype=torch.float64)
    attention = cross_modality_attention(places, torch.tensor([[5.0, 0.0], [0.0, 0.1], [-1.0, 0.0]]).double())
    half = 0.5**0.5
    printed = torch.tensor([[1 / (1 + half), half / (1 + half), 0], [0, 1, 0], [0, 0, 1]])  # without eps
    assert (attention[0] - printed).abs().max() < 1.5e-3
    assert torch.allclose(attention.sum(-1), torch.ones(1, 3, dtype=torch.float64), **EXACT)
    # The scale of a place or of an embedding says nothing.
    again = cross_modality_attention(places * torch.tensor([9, 0.2, 3]), torch.tensor([[1.0, 0]]).double())
    torch.testing.assert_close(again[0, 0], attention[0, 0], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["away from all classes", "nothing at all", "no label embeddings"])
def test_maps_that_no_class_looks_like_have_finite_logits_and_gradients(case, dtype):
    head = MSCMAHead([4, 4], 3, embed_dim=4)
    head.label_embeddings.fill_(0.0 if case == "no label embeddings" else 1.0)
    for transform in head.transforms:
        transform[0].weight.data = torch.eye(4)[:, :, None, None]
        transform[0].bias.data.fill_(1.0 if case == "away from all classes" else 0.0)
        transform[2].weight.data = -torch.eye(4)[:, :, None, None]
        transform[2].bias.data.fill_(0.0)
    maps = [torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 1, 1)]
    if case == "no label embeddings":
        maps = [torch.rand(2, 4, 3, 3), torch.rand(2, 4, 1, 1)]
    head, maps = head.to(dtype), [m.to(dtype).requires_grad_() for m in maps]
    logits = head(maps)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    gradients = [p.grad for p in (*head.parameters(), *maps)]
    assert all(torch.isfinite(g).all() for g in gradients)
    if case != "nothing at all":  # all places count the same, and learn
        means = torch.cat([t(m).mean((2, 3)) for t, m in zip(head.transforms, maps, strict=True)], dim=1)
        tolerance = {"rtol": 0, "atol": 1e-6 if dtype in (torch.float64, torch.float32) else 0.05}
        torch.testing.assert_close(logits, means @ head.weight.T + head.bias, **tolerance)
        assert all(m.grad.any() for m in maps)


@pytest.mark.parametrize("head", [MLDecoderHead(8, 4, embed_dim=16), Query2LabelHead(8, 4)], ids=["ml", "q2l"])
def test_float32_agrees_with_float64_and_bfloat16_runs(head):
    x = features(2, 8, 5, 3)
    exact = head.double().eval()(x)
    assert torch.allclose(head.float()(x.float()).double(), exact, atol=5e-6)
    low = head.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.isfinite(low).all()


def test_ms_cma_in_float32_agrees_with_float64_and_in_bfloat16_runs():
    head = MSCMAHead([8, 6], 4, embed_dim=16)
    head.label_embeddings.normal_(generator=torch.Generator().manual_seed(0))
    maps = [features(2, 8, 5, 3), features(2, 6, 2, 2)]
    exact = head.double()(maps)
    assert torch.allclose(head.float()([m.float() for m in maps]).double(), exact, atol=5e-6)
    low = head.bfloat16()([m.bfloat16() for m in maps])
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.double(), exact, atol=0.02)


def test_positions_do_not_repeat_and_tell_rows_from_columns():
    table = sine_positions(6, 7, 16, torch.zeros(1, dtype=torch.float64))
    assert table.shape == (16, 6, 7)
    places = table.flatten(1).T
    assert torch.cdist(places, places).fill_diagonal_(1).min() > 0.05
    assert (table[:8] == table[:8, :, :1]).all()
    assert (table[8:] == table[8:, :1, :]).all()


# ---- reference state dicts ----


def ml_decoder_keys(channels: int, num_labels: int, dim: int, queries: int, inner: int) -> dict[str, tuple]:
    """Names and shapes as Alibaba-MIIL/ML_Decoder saves them."""
    layer = "decoder.layers.0."
    return {
        "decoder.embed_standart.weight": (dim, channels), "decoder.embed_standart.bias": (dim,),
        "decoder.query_embed.weight": (queries, dim),
        **{f"{layer}norm{i}.{part}": (dim,) for i in (1, 2, 3) for part in ("weight", "bias")},
        f"{layer}multihead_attn.in_proj_weight": (3 * dim, dim), f"{layer}multihead_attn.in_proj_bias": (3 * dim,),
        f"{layer}multihead_attn.out_proj.weight": (dim, dim), f"{layer}multihead_attn.out_proj.bias": (dim,),
        f"{layer}linear1.weight": (inner, dim), f"{layer}linear1.bias": (inner,),
        f"{layer}linear2.weight": (dim, inner), f"{layer}linear2.bias": (dim,),
        "decoder.duplicate_pooling": (queries, dim, -(-num_labels // queries)),
        "decoder.duplicate_pooling_bias": (num_labels,),
    }  # fmt: skip


def q2l_keys(num_labels: int, dim: int, inner: int) -> dict[str, tuple]:
    """Names and shapes as SlongLiu/query2labels saves them, without the backbone."""
    keys = {"query_embed.weight": (num_labels, dim), "fc.W": (1, num_labels, dim), "fc.b": (1, num_labels)}
    layers = {"encoder.layers.0": ("self_attn", (1, 2))}
    layers |= {f"decoder.layers.{i}": ("multihead_attn", (2, 3)) for i in (0, 1)}
    for name, (attention_name, norms) in layers.items():
        layer = f"transformer.{name}."
        keys |= {f"{layer}norm{i}.{part}": (dim,) for i in norms for part in ("weight", "bias")}
        keys |= {
            f"{layer}{attention_name}.in_proj_weight": (3 * dim, dim),
            f"{layer}{attention_name}.in_proj_bias": (3 * dim,),
            f"{layer}{attention_name}.out_proj.weight": (dim, dim),
            f"{layer}{attention_name}.out_proj.bias": (dim,),
            f"{layer}linear1.weight": (inner, dim), f"{layer}linear1.bias": (inner,),
            f"{layer}linear2.weight": (dim, inner), f"{layer}linear2.bias": (dim,),
        }  # fmt: skip
    return keys | {f"transformer.decoder.norm.{part}": (dim,) for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        (MLDecoderHead(32, 80), ml_decoder_keys(32, 80, 768, 80, 2048)),
        (MLDecoderHead(32, 80, num_groups=20), ml_decoder_keys(32, 80, 768, 20, 2048)),
        (MLDecoderHead(32, 130), ml_decoder_keys(32, 130, 768, 100, 2048)),
        (Query2LabelHead(24, 80), q2l_keys(80, 24, 8192)),
        (
            Query2LabelHead(32, 80, embed_dim=24),
            q2l_keys(80, 24, 8192) | {"input_proj.weight": (24, 32, 1, 1), "input_proj.bias": (24,)},
        ),
    ],
    ids=["ml", "ml with groups", "ml of many classes", "q2l", "q2l projected"],
)
def test_reference_state_dicts_load_by_their_own_names(head, keys):
    state = {name: torch.rand(shape) for name, shape in keys.items()}
    head.load_state_dict(state)  # strict
    assert all(torch.equal(head.state_dict()[name], state[name]) for name in keys)


def test_sizes_are_those_of_the_publications():
    def millions(head: nn.Module) -> float:
        return sum(p.numel() for p in head.parameters()) / 1e6

    assert millions(MLDecoderHead(2048, 20)) == pytest.approx(7.12, abs=0.005)
    assert millions(MLDecoderHead(2048, 80)) == pytest.approx(7.21, abs=0.005)
    assert millions(MLDecoderHead(2048, 80, num_groups=20)) == pytest.approx(7.17, abs=0.005)
    with torch.device("meta"):
        assert millions(Query2LabelHead(2048, 80).transformer) == pytest.approx(151, abs=0.5)


# ---- initial values and training ----


def test_initial_values_are_the_references():
    torch.manual_seed(0)
    head = MLDecoderHead(64, 300, num_groups=100, embed_dim=256)
    parts = head.decoder
    assert parts.query_embed.weight.std().item() == pytest.approx(1, rel=0.02)
    assert parts.duplicate_pooling.std().item() == pytest.approx(math.sqrt(2 / (3 * (256 + 100))), rel=0.02)
    assert parts.duplicate_pooling_bias.eq(0).all()
    assert parts.embed_standart.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    head = Query2LabelHead(64, 50)
    assert head.fc.W.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    layer = head.transformer.decoder.layers[1]
    assert layer.linear1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 8192)), rel=0.01)
    assert layer.multihead_attn.in_proj_weight.abs().max().item() == pytest.approx(math.sqrt(6 / 256), rel=0.01)


@pytest.mark.parametrize("trainable", [False, True])
def test_queries_are_trained_only_if_asked_for_and_all_else_is(trainable):
    head = MLDecoderHead(8, 4, embed_dim=16, trainable_queries=trainable)
    head(torch.rand(2, 8, 3, 3)).square().sum().backward()
    without = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ([] if trainable else ["decoder.query_embed.weight"])


def test_query2label_trains_all_of_its_weights():
    head = Query2LabelHead(8, 4, embed_dim=16)
    head(torch.rand(2, 8, 3, 3)).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_ms_cma_trains_all_of_its_weights_and_not_the_label_embeddings():
    head = MSCMAHead([8, 6], 4, embed_dim=16)
    head.label_embeddings.normal_()
    before = head.label_embeddings.clone()
    optimiser = torch.optim.SGD(head.parameters(), 0.1)
    head([torch.rand(2, 8, 3, 3), torch.rand(2, 6, 2, 2)]).square().sum().backward()
    optimiser.step()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert torch.equal(head.label_embeddings, before)
    assert "label_embeddings" in head.state_dict()
    assert head.weight.abs().max().item() == pytest.approx(32**-0.5, rel=0.1)


def test_dropout_acts_in_training_only():
    for head in (MLDecoderHead(8, 4, embed_dim=16), Query2LabelHead(8, 4)):
        x = torch.rand(2, 8, 3, 3)
        assert not torch.equal(head.train()(x), head(x))
        assert torch.equal(head.eval()(x), head(x))


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="num_groups is 0"):
        MLDecoderHead(8, 4, num_groups=0)
    with pytest.raises(ValueError, match="embed_dim is 20; it must be a multiple of num_heads, 8"):
        MLDecoderHead(8, 4, embed_dim=20)
    with pytest.raises(ValueError, match="embed_dim is 0; it must be 1 or more"):
        MSCMAHead([8], 4, embed_dim=0)
    with pytest.raises(ValueError, match=r"width is 6; it must be a multiple of 4 .*; set embed_dim"):
        Query2LabelHead(6, 4)


def test_num_queries_is_rounded_by_integers():
    with torch.device("meta"):
        head = MLDecoderHead(8, 10_001, num_groups=10_000, embed_dim=8, inner_dim=8)
    assert head.decoder.duplicate_pooling.shape == (10_000, 8, 2)
