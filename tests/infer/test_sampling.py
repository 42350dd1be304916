"""The choice of a token: against Hugging Face's warpers first, then properties that any choice must have."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.errors import CheckpointError, ConfigError
from regpt.infer.sampling import (
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    scale_by_temperature,
    uniform,
)
from regpt.infer.settings import SamplingSettings


def random_logits(seed: int, rows: int = 8, vocab: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, None, None, None),
        (0.7, 1, None, None),
        (1.3, 10, None, None),
        (1.0, 300, None, None),
        (1.0, 5000, None, None),
        (1.0, None, 0.9, None),
        (2.0, None, 0.001, None),
        (1.0, None, 0.999999, None),
        (1.0, None, None, 0.05),
        (1.0, None, None, 1.0),
        (0.5, 50, 0.8, 0.02),
        (3.0, 7, 0.5, 0.5),
    ],
)
def test_filters_equal_hugging_face(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Each filter, and all in the same order, keep exactly the tokens that HF's warpers keep."""
    hf = pytest.importorskip("transformers")
    theirs = ours = random_logits(seed)
    warpers = [hf.TemperatureLogitsWarper(temperature)]
    ours = scale_by_temperature(ours, temperature)
    if top_k is not None:
        warpers.append(hf.TopKLogitsWarper(top_k))
        ours = keep_top_k(ours, top_k)
    if top_p is not None:
        warpers.append(hf.TopPLogitsWarper(top_p))
        ours = keep_top_p(ours, top_p)
    if min_p is not None:
        warpers.append(hf.MinPLogitsWarper(min_p))
        ours = keep_min_p(ours, min_p)
    for warper in warpers:
        theirs = warper(torch.zeros(8, 1, dtype=torch.long), theirs)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choices_follow_the_softmax(temperature: float) -> None:
    """40,000 choices against the expected counts: chi-square, 19 degrees of freedom, p of 1e-6 at 63."""
    n, logits = 40_000, random_logits(0, rows=1, vocab=20)[0]
    ids = choose(logits.expand(n, -1), [uniform(7, i, 0) for i in range(n)], temperature=temperature)
    expected = n * (logits / temperature).softmax(-1)
    counts = torch.tensor(ids).bincount(minlength=20)
    assert ((counts - expected) ** 2 / expected).sum() < 63


def test_filtered_choices_follow_the_renormalised_softmax() -> None:
    """With top-k 5 the five likeliest share all choices: 4 degrees of freedom, p of 1e-6 at 34."""
    n, logits = 20_000, random_logits(1, rows=1, vocab=100)[0]
    ids = choose(logits.expand(n, -1), [uniform(8, i, 0) for i in range(n)], temperature=1.5, top_k=5)
    top = logits.topk(5)
    counts = torch.tensor(ids).bincount(minlength=100)
    assert counts[top.indices].sum() == n
    expected = n * (top.values / 1.5).softmax(-1)
    assert ((counts[top.indices] - expected) ** 2 / expected).sum() < 34


def test_draw_inverts_the_distribution_function() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    for u, expected in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)]:
        assert draw(probs, [u]) == [expected]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.1, 1.0, 3.0]), min_size=1, max_size=12).filter(any),
    st.one_of(st.just(0.0), st.just(1 - 2**-53), st.floats(0, 1, exclude_max=True)),
)
def test_an_id_without_mass_is_never_drawn(weights: list[float], u: float) -> None:
    (drawn,) = draw(torch.tensor([weights], dtype=torch.float64), [u])
    assert 0 <= drawn < len(weights) and weights[drawn] > 0


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_greedy_takes_the_likeliest_and_of_equals_the_lowest(u: float) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, -math.inf], [2.0, 2.0, 2.0, 2.0], [-9.0, -8.0, -7.0, -6.0]])
    assert choose(logits, [u] * 3, temperature=0) == [1, 0, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("u", [0.0, 0.3, 0.99, 1 - 2**-53])
def test_a_temperature_near_zero_is_greedy(u: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 4.0, 3.9, -math.inf]], dtype=dtype)
    assert choose(logits, [u], temperature=1e-300) == [1]
    assert choose(logits, [u], temperature=1.0, top_k=1) == [1]
    assert choose(logits, [u], temperature=1.0, top_p=1e-9) == [1]
    assert choose(logits, [u], temperature=1.0, min_p=1.0) == [1]


def test_a_huge_temperature_is_uniform_over_what_is_possible() -> None:
    logits = torch.tensor([[900.0, -900.0, 0.0, -math.inf]]).expand(3000, -1)
    ids = choose(logits, [uniform(0, i, 0) for i in range(3000)], temperature=1e300)
    counts = torch.tensor(ids).bincount(minlength=4)
    assert counts[3] == 0 and counts[:3].min() > 900


def test_equal_tokens() -> None:
    """top-k keeps all that are as likely as the last of the k, as HF does; top-p prefers the lower ids."""
    flat = torch.zeros(1, 10, dtype=torch.float64)
    assert keep_top_k(flat, 3).isfinite().sum() == 10
    assert keep_top_p(flat, 0.25).isfinite()[0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_filters_that_keep_everything_change_nothing() -> None:
    logits, u = random_logits(3), [uniform(1, i, 2) for i in range(8)]
    plain = choose(logits, u)
    assert choose(logits, u, top_k=300, top_p=1.0, min_p=0.0) == plain
    assert choose(logits, u, top_k=10**9) == plain


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_output_that_is_not_finite_is_an_error(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    with pytest.raises(CheckpointError, match="the model's output is not finite"):
        choose(logits, [0.5, 0.5], temperature=temperature)
    with pytest.raises(CheckpointError, match="the model's output is not finite"):
        choose(torch.full((1, 5), -math.inf), [0.5], temperature=temperature)


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    """Along each argument: the mean, the largest gap to the diagonal (Kolmogorov), the serial correlation."""
    n = 20_000
    for series in (
        [uniform(i, 0, 0) for i in range(n)],
        [uniform(0, i, 0) for i in range(n)],
        [uniform(0, 0, i) for i in range(n)],
    ):
        x = torch.tensor(series, dtype=torch.float64)
        assert x.min() >= 0 and x.max() < 1
        assert (x.sort().values - torch.arange(n) / n).abs().max() < 2.5 / math.sqrt(n)
        assert abs(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1]) < 5 / math.sqrt(n)


def test_uniform_is_the_same_everywhere() -> None:
    """A changed value would change every seeded text."""
    assert [uniform(1337, 0, 0), uniform(1337, 1, 0), uniform(-1, 0, 10**6)] == PINNED


PINNED = [0.6404124054093454, 0.030797445818307678, 0.18247704768772122]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"temperature": -0.1},
            "temperature is out of range.\n  got: -0.1\n  expected: 0 (the likeliest token) or more",
        ),
        (
            {"temperature": math.nan},
            "temperature is out of range.\n  got: nan\n  expected: 0 (the likeliest token) or more",
        ),
        (
            {"temperature": math.inf},
            "temperature is out of range.\n  got: inf\n  expected: 0 (the likeliest token) or more",
        ),
        (
            {"top_k": 0},
            "top_k is out of range.\n  got: 0\n  expected: at least 1, or none to keep all tokens",
        ),
        ({"top_p": 0.0}, "top_p is out of range.\n  got: 0.0\n  expected: above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is out of range.\n  got: 1.1\n  expected: above 0 and at most 1"),
        ({"min_p": -1}, "min_p is out of range.\n  got: -1\n  expected: from 0 to 1"),
        ({"min_p": math.nan}, "min_p is out of range.\n  got: nan\n  expected: from 0 to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is out of range.\n  got: 0\n  expected: at least 1"),
        ({"n": 0}, "n is out of range.\n  got: 0\n  expected: at least 1"),
        (
            {"stop": ("a", "")},
            "stop is out of range.\n  got: ''\n  expected: text that is not empty",
        ),
    ],
)
def test_settings_out_of_range(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        SamplingSettings(**values)
    assert str(e.value) == message


def test_settings_are_checked_without_torch() -> None:
    """The command line is parsed with them, and must answer at once."""
    code = "import sys, regpt.infer.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
