"""The bridge to lm-eval: the same figures, log-probabilities and texts as its own Hugging Face model of the same weights."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import as_hugging_face
from regpt.config import ModelConfig
from regpt.errors import ConfigError, DataError
from regpt.models.gpt2 import GPT2
from regpt.tokenizers import Tokenizer
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.tokenizers.chars import train_chars
from regpt.tokenizers.gpt2 import open_gpt2

pytest.importorskip("lm_eval")
hf = pytest.importorskip("transformers")

from regpt.adapters import lm_eval as bridge  # noqa: E402

LOGPROB = 1e-4  # nats of a whole continuation
CHOICES = """
task: animals
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/animals.jsonl}, cache_dir: FOLDER/cache}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/texts.jsonl}, cache_dir: FOLDER/cache}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
LAST_WORD = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/texts.jsonl}, cache_dir: FOLDER/cache}
output_type: loglikelihood
validation_split: validation
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GENERATED = """
task: written
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/animals.jsonl}, cache_dir: FOLDER/cache}
output_type: generate_until
validation_split: validation
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ANIMALS = [
    {
        "question": f"{q} of row {i}?",
        "choices": ["a cat", "a very large dog", "two birds", "ein Löwe 漢"],
        "answer": i % 4,
    }
    for i, q in enumerate(
        ["Which animal barks", "What flies over the hills", "Who is king", "Who sleeps all day"] * 5
    )
]
TEXTS = [
    {"text": f"In the year {i} some little ducks went out, over the hills and far away. " * i + "Quack"}
    for i in range(1, 9)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files with their rows beside them."""
    made = tmp_path_factory.mktemp("tasks")
    for name, rows in (("animals", ANIMALS), ("texts", TEXTS)):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("a", CHOICES), ("b", ROLLING), ("c", LAST_WORD), ("d", GENERATED)):
        (made / f"{name}.yaml").write_text(text.replace("FOLDER", str(made)), encoding="utf-8")
    return made


def random_model(vocab_size: int, seed: int = 3) -> GPT2:
    """Small, with weights so wide that it has opinions."""
    torch.manual_seed(seed)
    model = GPT2(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64), vocab_size).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = ".ln_" in f".{name}" and name.endswith("weight")
            p.normal_(1.0 if norm else 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def pair(test_data: Path) -> tuple[GPT2, Tokenizer, Any]:
    """Our model, its tokenizer, and lm-eval's own model of the same weights and tokenizer."""
    from lm_eval.models.huggingface import HFLM

    files = test_data / "tokenizer"
    ours = random_model(50_257)
    merges = (files / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    vocab = json.loads((files / "encoder.json").read_text(encoding="utf-8"))
    tokenizer = hf.GPT2Tokenizer(vocab=vocab, merges=[tuple(m.split()) for m in merges if m])
    return (
        ours,
        open_gpt2(str(files)),
        HFLM(
            pretrained=as_hugging_face(ours),
            tokenizer=tokenizer,
            backend="causal",
            device="cpu",
            batch_size=1,
        ),
    )


def evaluated(
    folder: Path, names: list[str], model: GPT2, tokenizer: Tokenizer, **more: Any
) -> dict[str, Any]:
    return bridge.evaluate(bridge.open_tasks(names, folder), model, tokenizer, **more)


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_figures_are_those_of_its_own_model(pair: tuple[GPT2, Tokenizer, Any], folder: Path) -> None:
    """Choices, last words, rolling windows and greedy texts: accuracies exactly, the rest to rounding."""
    from lm_eval import simple_evaluate

    ours, tokenizer, theirs = pair
    names = ["animals", "texts", "words", "written"]
    tasks = bridge.open_tasks(names, folder)
    expected = simple_evaluate(theirs, tasks=names, task_manager=tasks.manager, bootstrap_iters=0)["results"]
    got = bridge.evaluate(tasks, ours, tokenizer)
    for task in ("animals", "words", "written"):
        for figure in {"acc", "acc_norm", "exact_match"} & set(got[task]):
            assert got[task][figure] == expected[task][f"{figure},none"], (task, figure)
    assert got["animals"]["rows"] == 20 and "acc_norm" in got["animals"]
    for task, figure in (("texts", "word_perplexity"), ("texts", "bits_per_byte"), ("words", "perplexity")):
        assert got[task][figure] == pytest.approx(expected[task][f"{figure},none"], rel=1e-4)
    assert got["words"]["perplexity_stderr"] > 0


@pytest.mark.filterwarnings("default")
def test_answers_are_those_of_its_own_model(pair: tuple[GPT2, Tokenizer, Any]) -> None:
    """Request by request: empty contexts, contexts that end in spaces, texts beyond the context, stop strings."""
    ours, tokenizer, theirs = pair
    mine = bridge.HarnessModel(ours, tokenizer)

    def asked(*args: Any) -> Any:
        return SimpleNamespace(args=args)

    long = "over the hills and far away " * 30
    pairs = [
        ("", "ducks"),
        ("Two words ", "more"),
        (long, " away"),
        ("a\n", " b c"),
        ("Quack", "ed, loudly: 漢"),
    ]
    requests = [asked(*p) for p in pairs]
    for got, expected in zip(
        mine.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert got[0] == pytest.approx(expected[0], abs=LOGPROB) and got[1] == expected[1]
    texts = [asked(text) for text in ("x", long, "One short text.", "")]
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert mine.loglikelihood_rolling(texts) == pytest.approx(expected, abs=LOGPROB * 10)
    whole = theirs.generate_until([asked("Ducks", {"until": [], "max_gen_toks": 20})], disable_tqdm=True)[0]
    asks = [
        asked("Ducks", {"until": ["\n\n"], "max_gen_toks": 20}),
        asked("Ducks", {"until": [whole[8:11]], "max_gen_toks": 20}),
        asked(long, {"until": [], "max_gen_toks": 20}),
    ]
    generated = mine.generate_until(asks)
    assert generated == theirs.generate_until(asks, disable_tqdm=True)
    assert generated[1] == whole[: whole.index(whole[8:11])] != whole


def test_the_terminal_belongs_to_the_caller(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing of lm-eval's reaches standard output or standard error; progress comes through the caller's own."""
    heard: list[tuple[str, int, int]] = []
    evaluated(
        folder,
        ["animals", "words"],
        random_model(257),
        ByteTokenizer(),
        rows=3,
        progress=lambda *said: heard.append(said),
    )
    assert capfd.readouterr() == ("", "")
    assert ("scoring answers", 15, 15) in heard  # 3 rows of 4 choices, 3 of one word
    assert os.environ.get("DISABLE_MULTIPROC") is None and logging.getLogger("lm_eval").propagate


def test_rows_and_examples_are_as_asked(folder: Path) -> None:
    few = evaluated(folder, ["animals"], random_model(257), ByteTokenizer(), rows=6, num_fewshot=1)
    assert few["animals"]["rows"] == 6 and few["animals"]["num_fewshot"] == 1
    again = evaluated(folder, ["animals"], random_model(257), ByteTokenizer(), rows=6, num_fewshot=1)
    assert few == again


@pytest.fixture
def own_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own thousands of task files, which take a quarter of a minute to read."""
    whole = bridge.TaskManager

    def small(include_path: str, include_defaults: bool = False) -> Any:
        return whole(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(bridge, "TaskManager", small)


def test_groups_and_patterns_bring_their_tasks(folder: Path, own_only: None) -> None:
    group = (
        "group: zoo\ntask: [animals, words]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (folder / "zoo.yaml").write_text(group, encoding="utf-8")
    for name in ("zoo", "zo*"):
        tasks = bridge.open_tasks([name], folder)
        found = bridge.evaluate(tasks, random_model(257), ByteTokenizer(), rows=4)
        assert set(found) == {"zoo", "animals", "words"}
        each = (found["animals"]["acc"], found["words"]["acc"])
        assert found["zoo"]["acc"] == pytest.approx(sum(each) / 2)
    (folder / "zoo.yaml").unlink()


def test_a_wrong_name_names_the_nearest(folder: Path, own_only: None) -> None:
    with pytest.raises(ConfigError, match=r"lm-eval has no task 'animal'. Did you mean animals\?"):
        bridge.open_tasks(["animal"], folder)


def test_task_files_that_cannot_be_used_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        bridge.open_tasks(["animals"], tmp_path / "nowhere")
    (tmp_path / "t.yaml").write_text(CHOICES.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    with pytest.raises(DataError, match="cannot load the task animals: FileNotFoundError") as caught:
        bridge.open_tasks(["animals"], tmp_path)
    assert "data_files" in str(caught.value)
    (tmp_path / "animals.jsonl").write_text(json.dumps({"question": "?"}) + "\n")
    with pytest.raises(DataError, match=r"lm-eval (stops at|cannot load the task) animals: "):
        evaluated(tmp_path, ["animals"], random_model(257), ByteTokenizer())


def test_a_character_that_the_tokenizer_lacks_is_named(folder: Path) -> None:
    tokenizer = train_chars(["abc"])
    with pytest.raises(DataError, match="Q"):
        evaluated(folder, ["animals"], random_model(tokenizer.vocab_size), tokenizer)


def test_sampled_repeats_differ_and_come_again() -> None:
    """Each request has its place for a seed."""
    ours = bridge.HarnessModel(random_model(257), ByteTokenizer())
    asked = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    repeats = [SimpleNamespace(args=("Ducks", asked))] * 3
    texts = ours.generate_until(repeats)
    assert len(set(texts)) == 3
    assert ours.generate_until(repeats) == texts


def test_a_way_of_generating_that_we_lack_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    text = GENERATED.replace("FOLDER", str(folder)).replace("max_gen_toks: 12", "typical_p: 0.9")
    (tmp_path / "d.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="a task of lm-eval asks for generation with typical_p") as caught:
        bridge.open_tasks(["written"], tmp_path)
    assert "got: 0.9" in str(caught.value) and "try: a task file of your own" in str(caught.value)


def test_what_generation_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="generation with num_beams, which regpt does not have") as caught:
        bridge.generation({"until": ["."], "num_beams": 4})
    assert "got: 4" in str(caught.value)
    settings = bridge.generation(
        {"until": ".", "do_sample": True, "temperature": 0.5, "top_k": 0, "num_beams": 1}
    )
    assert (settings.temperature, settings.top_k, settings.stop) == (0.5, None, (".",))
    assert bridge.generation({"temperature": 0.0}).temperature == 0.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are fastest on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
