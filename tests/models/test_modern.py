"""The modern model's parts against their authorities, and every switch: what it does, and that the cache equals the forward."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from regpt.config import ModelConfig, ModernConfig, build, to_dict
from regpt.errors import ConfigError
from regpt.infer.cache import KVCache
from regpt.models import build_model
from regpt.models.attention import attend
from regpt.models.count import count_parameters, flops_per_token, forward_flops_per_token
from regpt.models.gpt2 import GPT2
from regpt.models.modern import Modern, normalized, rotate, turns
from regpt.models.shape import check_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, CONTEXT = 65, 24
# Each switch away from its default.
SWITCHES: list[dict[str, Any]] = [
    {},
    {"rope": False},
    {"rope_fraction": 1.0},
    {"rope_base": 100.0},
    {"qk_norm": False},
    {"attention_scale": 0.3},
    {"norm": "layer"},
    {"embed_norm": False},
    {"activation": "gelu"},
    {"zero_init": False},
    {"value_embeddings": False},
    {"residual_scalars": False},
    {"x0_scalars": False},
    {"softcap": None},
    {"tied": True},
    {"bigram": True},
    {"trigram": 50},
    {"bigram": True, "trigram": 50, "window": 3},
    {"window": 5},
    {"window": 1},
]


def shape(**switches: Any) -> ModelConfig:
    return ModelConfig(
        arch="modern", n_layer=3, n_head=4, n_embd=32, block_size=CONTEXT, modern=ModernConfig(**switches)
    )


def made(seed: int = 0, **switches: Any) -> Modern:
    """In evaluation; what begins at zero is not zero, so that everything takes part."""
    torch.manual_seed(seed)
    model = Modern(shape(**switches), VOCAB).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if not p.any() else None
        if model.residual_scalars is not None:
            model.residual_scalars.copy_(torch.tensor([0.8, 1.1, 0.9]))
    return model


def some_ids(rows: int = 2, positions: int = CONTEXT) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, positions), generator=torch.Generator().manual_seed(1))


# --- parts against authorities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_rotation_is_that_of_hugging_faces_gpt_neox(fraction: float, base: float) -> None:
    """Queries and keys of 2 rows x 10 positions x 3 heads x 16, of which all or half of the dimensions rotate."""
    theirs = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    config = theirs.GPTNeoXConfig(
        hidden_size=48,
        num_attention_heads=3,
        max_position_embeddings=10,
        rope_parameters={"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction},
    )
    q, k = torch.randn(2, 2, 10, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = theirs.GPTNeoXRotaryEmbedding(config)(q, torch.arange(10)[None])
    wanted = theirs.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    ours = ModelConfig(
        arch="modern",
        n_head=3,
        n_embd=48,
        block_size=10,
        modern=ModernConfig(rope_fraction=fraction, rope_base=base),
    )
    for got, want in zip((rotate(q, turns(ours)), rotate(k, turns(ours))), wanted, strict=True):
        torch.testing.assert_close(got, want.transpose(1, 2), rtol=0.0, atol=2e-6)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    """The same q and k at every position: q·k is constant along diagonals."""
    turn = turns(shape(rope_fraction=1.0))
    q, k = (
        torch.randn(8, generator=torch.Generator().manual_seed(s)).expand(1, CONTEXT, 1, 8) for s in (0, 1)
    )
    products = rotate(q, turn)[0, :, 0] @ rotate(k, turn)[0, :, 0].T
    for offset in range(-5, 6):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0.0, atol=1e-5)


def test_rms_norm_is_that_of_hugging_faces_llama() -> None:
    theirs = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalized(x), theirs.LlamaRMSNorm(16, eps=1e-7)(x))


def test_rms_norm_in_16_bits() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    assert normalized(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(normalized(x.bfloat16()).float(), normalized(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("T", "S"), [(1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_a_window_by_hand(T: int, S: int, window: int | None, dtype: torch.dtype) -> None:
    """By the kernel and by products (bfloat16 on a CPU, T = S): softmax over j with i - window < j <= i, times a scale."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=draw) for n in (T, S, S))
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    seen = (j <= i) & (i - j < (window or S))
    wanted = (q @ k.mT * 0.7).masked_fill(~seen, -math.inf).softmax(-1) @ v
    got = attend(*(t.to(dtype) for t in (q, k, v)), scale=0.7, window=window)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.float(), wanted, rtol=0.0, atol=tolerance)


# --- every switch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 7, CONTEXT])
def test_cached_decoding_equals_the_full_forward(switches: dict[str, Any], size: int) -> None:
    """In pieces of `size` tokens; a cache that was used before and cleared."""
    model, ids = made(**switches), some_ids()
    cache = KVCache(model.config, 2, CONTEXT, "cpu", torch.float32)
    with torch.no_grad():
        model.hidden(some_ids().flip(1)[:, :5], cache)
        cache.clear()
        got = torch.cat([model.head(model.hidden(piece, cache)) for piece in ids.split(size, dim=1)], dim=1)
        torch.testing.assert_close(got, model(ids), rtol=0.0, atol=1e-5)


def test_cached_rows_that_are_left_keep_their_n_grams() -> None:
    """A prompt of one row shared by three, then rows 2 and 0 go on alone."""
    model, ids = made(bigram=True, trigram=50), some_ids(3)
    ids[:, :4] = ids[0, :4]
    cache = KVCache(model.config, 3, CONTEXT, "cpu", torch.float32)
    with torch.no_grad():
        model.hidden(ids[:1, :4], cache)
        model.hidden(ids[:, 4:6], cache)
        cache.keep([2, 0])
        got = model.head(model.hidden(ids[[2, 0], 6:9], cache))
        torch.testing.assert_close(got, model(ids[[2, 0], :9])[:, 6:], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("vocab", [1, 65, 128, 211])
def test_count_equals_the_built_model(switches: dict[str, Any], vocab: int) -> None:
    config = shape(**switches)
    with torch.device("meta"):
        model = Modern(config, vocab)
    counted = count_parameters(config, vocab)
    assert counted.stored == sum(p.numel() for p in model.parameters())
    blocks = list(model.h.parameters())
    scalars = [p for p in (model.residual_scalars, model.x0_scalars) if p is not None]
    assert counted.blocks == sum(p.numel() for p in [*blocks, *scalars])
    assert counted.matrices == sum(p.numel() for n, p in model.h.named_parameters() if "gate" not in n)
    padded = [m for m in (model.wte, model.lm_head) if m is not None]
    assert counted.padding == sum(m.weight[vocab:].numel() for m in padded)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_learns(switches: dict[str, Any]) -> None:
    """One batch by heart, from the weights that training starts with; every parameter moves, and no padding row."""
    torch.manual_seed(0)
    model = Modern(shape(**switches), VOCAB)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), some_ids(2, 12)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    assert model(ids[:, :-1], ids[:, 1:]).item() < 0.2
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    for padded in (model.wte, model.lm_head):
        assert padded is None or not padded.weight[VOCAB:].any()


@pytest.mark.parametrize("switches", SWITCHES[1:], ids=str)
def test_every_switch_changes_the_output(switches: dict[str, Any]) -> None:
    """With the same weights where names and shapes are the same."""
    plain, other, ids = made(), made(seed=0, **switches), some_ids()
    if switches == {"zero_init": False}:  # that one changes the start alone
        assert not Modern(plain.config, VOCAB).h[0].mlp.c_proj.weight.any()
        assert Modern(other.config, VOCAB).h[0].mlp.c_proj.weight.any()
        return
    other.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert not torch.allclose(plain(ids)[..., :VOCAB], other(ids)[..., :VOCAB], atol=1e-3)


def test_a_fresh_model_knows_nothing() -> None:
    """The loss is ln(V) to the bit of float32 where head and projections begin at zero; the stream is the embedding."""
    torch.manual_seed(0)
    model, ids = Modern(shape(), VOCAB), some_ids()
    assert model(ids, ids).item() == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert not model.head(model.hidden(ids))[..., :VOCAB].any()
    torch.testing.assert_close(model.hidden(ids), normalized(model.wte(ids)), rtol=0.0, atol=2e-3)


def test_the_soft_cap_bounds_logits() -> None:
    model, ids = made(softcap=2.0), some_ids()
    logits = 50 * model.lm_head.weight @ torch.randn(32)  # type: ignore[union-attr]
    model.lm_head.weight.data.mul_(50)  # type: ignore[union-attr]
    assert model(ids)[..., :VOCAB].abs().max() <= 2.0 < logits.abs().max()
    assert torch.isneginf(model(ids)[..., VOCAB:]).all()


def test_a_windowed_model_sees_no_further() -> None:
    """One windowed layer and no other attention: position i does not change when what is `window` before it does."""
    config = dataclasses.replace(shape(window=4), n_layer=2)
    torch.manual_seed(0)
    model = Modern(config, VOCAB).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if not p.any() else None
        model.h[1].attn.c_proj.weight.zero_()  # the last layer, which sees all
        ids = some_ids(1)
        other = ids.clone()
        other[:, 3] = (ids[:, 3] + 1) % VOCAB
        same = (model(ids) == model(other)).all(-1)[0]
    assert same.tolist() == [not 3 <= i < 7 for i in range(CONTEXT)]


def test_activations_computed_again_give_the_same_gradients() -> None:
    model, ids = made(bigram=True).train(), some_ids()
    wanted = torch.autograd.grad(model(ids, ids), list(model.parameters()))
    model.checkpoint_activations = True
    got = torch.autograd.grad(model(ids, ids), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_autocast_keeps_the_stream_in_float32() -> None:
    """And its loss is near that of float32."""
    model, ids = made(), some_ids()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids)
        assert model.embed(ids, 0, None).dtype == torch.float32
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(ids, ids).item(), rel=0.03)


# --- FLOPs --------------------------------------------------------------------------------------------------------


def test_flops_count_the_head_once_and_the_window() -> None:
    tied, untied = (forward_flops_per_token(shape(tied=t), 256) for t in (True, False))
    assert tied == untied  # one head's product either way
    full, near = (forward_flops_per_token(shape(window=w), 256) for w in (None, 5))
    assert full - near == 4 * 32 * (CONTEXT - 5)  # layer 1 of 3 has the window
    assert flops_per_token(shape(trigram=1000), 256) == flops_per_token(shape(), 256)  # looked up


def test_flops_equal_those_that_pytorch_counts() -> None:
    """Forward and backward; but that nothing flows back into the embedding of an untied head."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(arch="modern", n_layer=2, n_head=2, n_embd=128, block_size=64)
    model, ids = Modern(config, 512), torch.randint(0, 512, (2, 64))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).backward()
    counted = counter.get_total_flops() / ids.numel()
    assert flops_per_token(config, 512) == pytest.approx(counted, rel=0.002)


# --- what cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"rope_fraction": 0.0}, "model.modern.rope_fraction must lie in (0, 1]."),
        (
            {"rope_fraction": 0.1},
            "model.modern.rope_fraction=0.1 of 8 dimensions a head is less than the two",
        ),
        ({"rope_base": 1.0}, "model.modern.rope_base must be above 1."),
        (
            {"softcap": 0.0},
            "model.modern.softcap must be above 0.\n  got: 0.0\n  try: --model.modern.softcap none",
        ),
        ({"window": -1}, "model.modern.window must be above 0."),
        ({"trigram": 0}, "model.modern.trigram must be above 0."),
        ({"attention_scale": 0.0}, "model.modern.attention_scale must be above 0."),
    ],
)
def test_impossible_switches_are_refused(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Modern(shape(**switches), VOCAB)
    assert message in str(caught.value)


def test_an_exact_table_of_a_large_vocabulary_is_refused() -> None:
    check_model(shape(bigram=True), 1024)
    with pytest.raises(
        ConfigError, match=r"would need 50,258 x 50,257 rows.*\n  try: --model.modern.trigram"
    ):
        check_model(shape(bigram=True), 50257)


def test_switches_that_gpt2_would_pass_over_are_refused() -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, modern=ModernConfig(window=8, tied=True))
    with pytest.raises(ConfigError, match=r"GPT-2 has no model.modern.tied, model.modern.window"):
        build_model(config, VOCAB)


def test_the_setting_chooses_the_model() -> None:
    assert type(build_model(shape(), VOCAB)) is Modern
    assert type(build_model(dataclasses.replace(shape(), arch="gpt2"), VOCAB)) is GPT2


def test_settings_written_before_there_was_another_model_are_gpt2s() -> None:
    """As run.json and checkpoints of that time have them: no model.modern, no optim.name."""
    old = {
        "arch": "gpt2",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 8,
        "dropout": 0.0,
        "bias": True,
    }
    config = build(ModelConfig, old, where="state.json", prefix="model.")
    assert type(build_model(config, VOCAB)) is GPT2
    assert build(ModelConfig, to_dict(shape(window=5)), where="state.json") == shape(window=5)
