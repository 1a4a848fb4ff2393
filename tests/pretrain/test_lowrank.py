"""Plain low rank: the start is the nearest to what stood there."""

import torch
import transformers as hf
from torch import nn

import weft


def test_the_start_is_the_nearest_of_its_rank_shared_evenly():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(9, 7, dtype=torch.float64))])})
    w = model["layers"][0][0].weight.detach().clone()
    weft.reparametrise(model, "lowrank", rank=4)
    layer = model["layers"][0][0]
    u, s, vh = torch.linalg.svd(w)
    torch.testing.assert_close(layer.dense(), u[:, :4] * s[:4] @ vh[:4])
    norms = layer.up.weight.norm(dim=0), layer.down.weight.norm(dim=1)
    torch.testing.assert_close(norms[0], s[:4].sqrt())
    torch.testing.assert_close(norms[1], s[:4].sqrt())
    assert sum(p.numel() for p in layer.parameters()) == 4 * (9 + 7) + 7


def test_layers_right_inside_of_a_sequence_are_served():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    weft.reparametrise(model, "lowrank", rank=2)
    assert [type(m).__name__ for m in model] == ["LowRank", "ReLU", "LowRank"]


def test_both_sides_of_an_encoder_decoder_are_served():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=30, **sizes, **heads))
    weft.reparametrise(model, "lowrank", rank=2)
    made = [name for name, m in model.named_modules() if type(m).__name__ == "LowRank"]
    assert sum(".encoder." in name for name in made) == 6 and sum(".decoder." in name for name in made) == 20
