"""Generation: against Hugging Face, the cache against none, then what a caller may rely on."""

from __future__ import annotations

import random

import pytest
import torch
from scripted import ByteIds, Scripted, random_model

from regpt.config import ModelConfig
from regpt.errors import CheckpointError, DataError, DeviceError
from regpt.infer.cache import KVCache, cache_bytes
from regpt.infer.engine import (
    Piece,
    SamplingSettings,
    collect,
    complete,
    generate,
    kept_tokens,
    prompt_ids,
)
from regpt.infer.sampling import choose, uniform
from regpt.models.gpt2 import GPT2
from regpt.tokenizers.bytes import ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


# --- authorities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cached", [True, False])
def test_greedy_equals_hugging_face(seed: int, cached: bool) -> None:
    """The same weights in GPT2LMHeadModel generate the same tokens."""
    hf = pytest.importorskip("transformers")
    shape = {"n_layer": 1 + seed % 3, "n_head": 2, "n_embd": 32, "block_size": 64}
    ours = random_model(300, seed=seed, **shape)
    config = hf.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=shape["n_layer"], n_head=2, eos_token_id=None
    )
    theirs = hf.GPT2LMHeadModel(config).eval()
    weights = {}
    for name, p in ours.named_parameters():
        linear = name.endswith("weight") and ".c_" in name
        weights["transformer." + name] = p[:300] if name == "wte.weight" else p.T if linear else p
    missing = theirs.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys

    prompt = random.Random(seed).choices(range(299), k=1 + 4 * seed)
    expected = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    settings = SamplingSettings(max_new_tokens=40, temperature=0)
    pieces = list(generate(ours, NoEnd(300), prompt, settings, cached=cached))
    assert [p.token for p in pieces] == expected and len(set(expected)) > 3


class NoEnd(ByteIds):
    """A tokenizer whose end-of-text token no model says."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.eot_id = -1


def random_case(case: int) -> tuple[GPT2, ByteIds, list[int], SamplingSettings]:
    """A model of 1 to 3 layers and 2 to 300 ids; a prompt and lengths within the context and beyond it."""
    r = random.Random(case)
    heads, vocab_size = r.choice([1, 2, 4]), r.choice([2, 7, 60, 128, 300])
    model = random_model(
        vocab_size,
        seed=case,
        spread=r.choice([1, 5, 10]),
        n_layer=r.randint(1, 3),
        n_head=heads,
        n_embd=4 * heads,
        block_size=r.randint(1, 20),
    )
    prompt = [r.randrange(vocab_size) for _ in range(r.randint(0, 24))]
    settings = SamplingSettings(
        n=r.randint(1, 4),
        max_new_tokens=r.randint(1, 24),
        seed=case,
        temperature=r.choice([0, 0.5, 1, 2]),
        top_k=r.choice([None, None, 1, 5, 1000]),
        top_p=r.choice([None, None, 0.9]),
        min_p=r.choice([None, None, 0.1]),
        stop=r.choice([(), (), ("\x01",), ("\x02\x03", "\x05")]),
    )
    return model, ByteIds(vocab_size), prompt, settings


@pytest.mark.parametrize("hundred", range(10))
def test_the_cache_changes_no_token(hundred: int) -> None:
    """1,000 random cases in all, in float32: cached equals uncached, token for token."""
    slid = ended = 0
    for case in range(100 * hundred, 100 * hundred + 100):
        model, tokenizer, prompt, settings = random_case(case)
        pieces = list(generate(model, tokenizer, prompt, settings))
        assert pieces == list(generate(model, tokenizer, prompt, settings, cached=False)), f"case {case}"
        slid += any(p.slid for p in pieces)
        ended += len({p.finish_reason for p in pieces} - {None}) == 2  # rows that end at different places
    assert slid > 20 and ended > 0


# --- the context --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7, 16])
def test_a_full_context_goes_on_from_its_last_three_quarters(block_size: int) -> None:
    """The rule written out again, plainly: each token is what the model says to the window it should see."""
    model, tokenizer = random_model(50, block_size=block_size), NoEnd(50)
    ids, start, expected = [7, 8, 9], 0, []
    for _ in range(40):
        if len(ids) - start > block_size:
            start = len(ids) - kept_tokens(block_size)
        window = torch.tensor([ids[start:]])
        ids.append(int(model(window)[0, -1].argmax()))
        expected.append((ids[-1], start > 0))
    settings = SamplingSettings(max_new_tokens=40, temperature=0)
    assert [(p.token, p.slid) for p in generate(model, tokenizer, [7, 8, 9], settings)] == expected
    assert 1 <= kept_tokens(block_size) <= block_size


@pytest.mark.parametrize("length", [17, 18, 40])
def test_of_a_prompt_beyond_the_context_the_end_is_used(length: int) -> None:
    model, settings = random_model(), SamplingSettings(max_new_tokens=20, seed=1)
    prompt = list(range(length))
    (whole,) = complete(model, NoEnd(257), prompt, settings)
    (end,) = complete(model, NoEnd(257), prompt[-kept_tokens(16) :], settings)
    assert whole.tokens == end.tokens and whole.slid


def test_a_prompt_that_fills_the_context_is_seen_whole() -> None:
    model, prompt = random_model(), list(range(16))
    (piece,) = generate(model, NoEnd(257), prompt, SamplingSettings(max_new_tokens=1, temperature=0))
    assert piece.token == model(torch.tensor([prompt]))[0, -1].argmax() and not piece.slid


def test_more_tokens_asked_for_continue_the_same_text() -> None:
    model = random_model()
    short, long = (
        complete(model, NoEnd(257), "ab", SamplingSettings(max_new_tokens=k, seed=3))[0].tokens
        for k in (9, 50)
    )
    assert long[:9] == short


def test_nothing_prompts_with_the_end_of_text_token() -> None:
    model, tokenizer, settings = random_model(), ByteIds(), SamplingSettings(max_new_tokens=5, seed=3)
    assert prompt_ids(tokenizer, "") == prompt_ids(tokenizer, []) == [256]
    assert complete(model, tokenizer, "", settings) == complete(model, tokenizer, [256], settings)


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [3, 5, 8], [8, 1, 7], [15, 1]])
def test_a_cache_filled_in_parts(chunks: list[int]) -> None:
    """Any division of the ids into calls gives the model's own output for all of them at once."""
    model, ids = random_model(), torch.arange(32).view(2, 16)
    cache = KVCache(model.config, 2, 16, "cpu", torch.float32)
    with torch.no_grad():
        parts = [model.hidden(part, cache) for part in ids.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(ids))
    assert cache.length == 16


# --- several completions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [6, 257])
def test_completion_i_does_not_depend_on_n(vocab_size: int) -> None:
    """Also where rows end at different times: of 6 ids, one is the end of text."""
    model, tokenizer = random_model(vocab_size), ByteIds(vocab_size)
    done = {n: complete(model, tokenizer, [1, 2], SamplingSettings(n=n, seed=5)) for n in (1, 2, 5, 9)}
    assert len({tuple(c.tokens) for c in done[9]}) == 9
    for n, completions in done.items():
        assert completions == done[9][:n]


def test_each_token_is_drawn_from_its_own_number() -> None:
    """The whole of sampling written out plainly: completion i, step s, draws with uniform(seed, i, s)."""
    model, tokenizer, asked = random_model(12, block_size=40), ByteIds(12), {"temperature": 1.5, "top_k": 8}
    done = complete(model, tokenizer, [1], SamplingSettings(n=6, max_new_tokens=30, seed=9, **asked))
    for i, completion in enumerate(done):
        ids: list[int] = [1]
        for step in range(30):
            logits = model(torch.tensor([ids]))[:, -1]
            ids += choose(logits, [uniform(9, i, step)], **asked)
            if ids[-1] == 11:
                break
        assert completion.tokens == [i for i in ids[1:] if i != 11]
    assert len({len(c.tokens) for c in done}) > 2


def test_seeds() -> None:
    model, tokenizer = random_model(), ByteIds()

    def run(seed: int | None) -> list[int]:
        return complete(model, tokenizer, "x", SamplingSettings(max_new_tokens=30, seed=seed))[0].tokens

    torch.manual_seed(1)
    first = run(1)
    torch.manual_seed(2)
    assert run(1) == first  # the global generator has no part in it
    assert run(2) != first and run(2**32 + 1) != first and run(-1) != first
    assert run(None) != run(None)


def test_the_prompt_is_computed_once_and_then_one_position_a_step() -> None:
    model, shapes, heads = random_model(), [], []
    hidden, head = model.hidden, model.head
    model.hidden = lambda ids, cache=None: shapes.append(tuple(ids.shape)) or hidden(ids, cache)
    model.head = lambda x: heads.append(tuple(x.shape)) or head(x)
    complete(model, NoEnd(257), [1, 2, 3, 4, 5], SamplingSettings(n=3, max_new_tokens=4))
    assert shapes == [(1, 5), (3, 1), (3, 1), (3, 1)]
    assert heads == [(1, 1, 16), (3, 1, 16), (3, 1, 16), (3, 1, 16)]


def test_finished_rows_are_not_computed_further() -> None:
    model, rows = random_model(4), []
    hidden = model.hidden
    model.hidden = lambda ids, cache=None: rows.append(len(ids)) or hidden(ids, cache)
    done = complete(model, ByteIds(4), [0], SamplingSettings(n=8, max_new_tokens=100, seed=2))
    lengths = [len(c.tokens) for c in done]
    assert rows[1:] == [sum(length >= step for length in lengths) for step in range(1, max(lengths) + 1)]


# --- text ---------------------------------------------------------------------------------------------------


GREEDY = SamplingSettings(temperature=0, max_new_tokens=1000)


def test_characters_come_whole() -> None:
    text = "naïve 😀👩‍👩‍👧 漢字\n"
    pieces = list(generate(Scripted(list(text.encode())), ByteIds(), "p", GREEDY))
    assert [p.text for p in pieces if p.text] == list(text)
    assert len(pieces) == len(text.encode()) + 1 and pieces[-1].token == 256


def test_an_incomplete_character_at_the_end_becomes_the_replacement_character() -> None:
    script = list("a😀".encode())[:-1]
    (ended,) = complete(Scripted(script), ByteIds(), "p", GREEDY)
    assert (ended.text, ended.finish_reason) == ("a\ufffd", "stop")
    (cut,) = complete(Scripted(script), ByteIds(), "p", SamplingSettings(temperature=0, max_new_tokens=3))
    assert (cut.text, cut.finish_reason, cut.tokens) == ("a\ufffd", "length", script[:3])


def test_the_end_of_text_ends_a_completion_and_is_not_printed() -> None:
    (done,) = complete(Scripted(list(b"hello")), ByteIds(), "p", GREEDY)
    assert (done.text, done.tokens, done.finish_reason) == ("hello", list(b"hello"), "stop")
    (empty,) = complete(Scripted([]), ByteIds(), "p", GREEDY)
    assert (empty.text, empty.tokens, empty.finish_reason) == ("", [], "stop")


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("wor",), "hello ", 9),
        (("o", "hello world"), "hell", 5),
        (("lo w", "ello w"), "h", 7),
        (("worlds", "d!"), "hello world", 11),
        (("h",), "", 1),
    ],
)
def test_stop_strings(stop: tuple[str, ...], text: str, tokens: int) -> None:
    """The text ends before the stop string, and no part of it was shown before; the tokens include it."""
    settings = SamplingSettings(temperature=0, max_new_tokens=100, stop=stop)
    pieces = list(generate(Scripted(list(b"hello world")), ByteIds(), "p", settings))
    (done,) = collect(iter(pieces), 256)
    assert (done.text, len(done.tokens), done.finish_reason) == (text, tokens, "stop")


def test_pieces_end_with_a_reason_and_add_up() -> None:
    model, tokenizer = random_model(40), ByteIds(40)
    settings = SamplingSettings(n=5, max_new_tokens=60, seed=4, stop=("\x03\x04",))
    pieces = list(generate(model, tokenizer, [1], settings))
    done = complete(model, tokenizer, [1], settings)
    for index, completion in enumerate(done):
        row = [p for p in pieces if p.index == index]
        assert [p.finish_reason for p in row[:-1]] == [None] * (len(row) - 1)
        assert "".join(p.text for p in row) == completion.text
        assert row[-1].finish_reason == completion.finish_reason
    assert {c.finish_reason for c in done} == {"stop", "length"}


# --- the model is left as it was ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_inside_and_modes_do_not_leak(training: bool) -> None:
    model = random_model(dropout=0.5)
    expected = complete(model, ByteIds(), "abc", SamplingSettings(seed=1, max_new_tokens=30))
    model.train(training)
    pieces: list[Piece] = []
    for piece in generate(model, ByteIds(), "abc", SamplingSettings(seed=1, max_new_tokens=30)):
        pieces.append(piece)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert all(m.training == training for m in model.modules())
    assert collect(iter(pieces), 256) == expected
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()


def test_two_streams_of_one_model_do_not_disturb_each_other() -> None:
    model, a, b = random_model(), SamplingSettings(seed=1), SamplingSettings(seed=2, n=2)
    both = zip(generate(model, NoEnd(257), "x", a), generate(model, NoEnd(257), "yz", b), strict=False)
    left, right = zip(*both, strict=True)
    assert list(left) == list(generate(model, NoEnd(257), "x", a))[: len(left)]
    assert list(right) == list(generate(model, NoEnd(257), "yz", b))[: len(right)]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_and_in_bfloat16(weights: torch.dtype) -> None:
    """Samples during training in mixed precision: keys come in another type than the weights."""
    model, settings = random_model().to(weights), SamplingSettings(max_new_tokens=40, seed=1, n=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = complete(model, NoEnd(257), "abc", settings)
        assert done == complete(model, NoEnd(257), "abc", settings)
    assert [len(c.tokens) for c in done] == [40, 40]


def test_padding_ids_are_never_chosen() -> None:
    """5 ids padded to 128, at a temperature that makes all equally likely."""
    settings = SamplingSettings(n=4, max_new_tokens=200, temperature=1e9, seed=0)
    done = complete(random_model(5), NoEnd(5), [0], settings)
    assert {i for c in done for i in c.tokens} == {0, 1, 2, 3, 4}


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 257, 300])
def test_an_id_that_does_not_exist(bad: int) -> None:
    with pytest.raises(DataError) as e:
        generate(random_model(), ByteTokenizer(), [1, bad])  # refused at the call, not at the first piece
    assert f"id {bad}, at place 1, is not in the vocabulary" in str(e.value)


def test_damaged_weights() -> None:
    model = random_model()
    model.ln_f.weight.data[0] = torch.nan
    with pytest.raises(CheckpointError, match="the model's output is not finite"):
        complete(model, ByteIds(), "a")


def test_the_cache_states_its_memory() -> None:
    config = ModelConfig(n_layer=3, n_head=2, n_embd=8, block_size=32)
    cache = KVCache(config, 5, 17, "cpu", torch.bfloat16)
    assert cache.kv.nbytes == cache_bytes(config, 5, 17, torch.bfloat16)
    assert cache_bytes(ModelConfig(), 1, 1024, torch.float32) == 2 * 12 * 1024 * 768 * 4


def test_a_cache_that_does_not_fit() -> None:
    with pytest.raises(DeviceError, match=r"positions takes 75,497,472\.0 GB: more than cpu has"):
        KVCache(ModelConfig(), 10**9, 1024, "cpu", torch.float32)
