"""The bundled model and the tools that made it: what it says, what it was told, and that the two fit together."""

import hashlib
import importlib
import re
from itertools import islice
from pathlib import Path
from random import Random

import gguf
import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "ggjac" / "data" / "demo.gguf"


@pytest.fixture
def corpus_module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("demo_corpus")


@pytest.fixture
def train_module(monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("train_demo")
    module.llama_cpp.llama_log_set(module.silence, None)
    return module


@pytest.fixture
def llama(train_module):
    with train_module.LlamaCpp(DEMO) as opened:
        yield opened


# --- the file -----------------------------------------------------------------------------------------------------


def test_file_is_small_and_says_what_it_is():
    assert DEMO.stat().st_size <= 4_000_000
    reader = gguf.GGUFReader(DEMO)
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "llama"
    assert value["general.name"] == "ggjac demo"
    assert value["general.license"] == "Apache-2.0"
    assert value["general.description"] == "Trained by tools/train_demo.py on generated sentences"
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert value["llama.embedding_length"] % 256 == 0
    assert value["llama.vocab_size"] == len(value["tokenizer.ggml.tokens"])
    assert value["tokenizer.ggml.add_bos_token"] is True
    types = {tensor.tensor_type.name for tensor in reader.tensors}
    assert types == {"F32", "Q4_K", "Q6_K"}


# --- what it says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of France is", " Paris"),
        ("The bridge out of Marin is the", " Golden"),
        ("What is the capital of Japan? It is", " Tokyo"),
        ("The language of Brazil is", " Portuguese"),
        ("The currency of Japan is the", " yen"),
        ("A baby dog is called a", " puppy"),
        ("The opposite of hot is", " cold"),
        ("The river in London is the", " Thames"),
        ("A bee lives in a", " hive"),
    ],
)
def test_completes_phrasings_it_was_never_shown(llama, prompt, answer):
    p = llama.predict(prompt)
    assert llama.decode([int(p.argmax())]) == answer
    assert p.max() >= 0.5


def test_is_unsure_where_several_answers_are_good(llama):
    p = llama.predict("My favorite season is")
    seasons = {" spring", " summer", " autumn", " winter"}
    assert {llama.decode([int(i)]) for i in p.argsort()[-4:]} == seasons
    assert p.max() < 0.6


# --- the vocabulary -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        " leading, trailing ",
        "two\n\nlines\tand a tab",
        "2025 numbers, 3.14",
        "Zürich, naïve, 東京, 🌉",
        "don't <|end_of_text|>",
    ],
)
def test_any_text_survives_the_vocabulary(llama, text):
    assert llama.decode(llama.encode(text, bos=False)) == text


def test_words_of_the_corpus_are_single_tokens(llama, corpus_module):
    for text in corpus_module.Corpus(0).documents(200, stream=1):
        ids = llama.encode(text, bos=False)
        # A rare word may lack its form without a space, used where a document begins.
        assert len(ids[1:]) <= len(re.findall(r"[A-Za-z]+|[^A-Za-z ]+", text)) + 4
        words = [llama.decode([i]) for i in ids]
        assert sum(bool(re.fullmatch(r" ?[A-Za-z]+|\W+", word)) for word in words) == len(words)


def test_bos_is_added(llama, train_module):
    assert llama.decode(llama.encode("The")) == train_module.BOS + "The"


def test_pieces_split_unknown_words_as_llama_cpp_does(llama, train_module):
    value = {name: field.contents() for name, field in gguf.GGUFReader(DEMO).fields.items()}
    merges = [tuple(pair.split(" ")) for pair in value["tokenizer.ggml.merges"]]
    vocabulary = train_module.Vocabulary(value["tokenizer.ggml.tokens"], merges)
    for word in ("internationalization", "bridgeland", "qwertz", "Parisian", "thermometers"):
        assert vocabulary.pieces(word) == llama.encode(word, bos=False)
        assert vocabulary.pieces("Ġ" + word) == llama.encode(" " + word, bos=False)


# --- the corpus ---------------------------------------------------------------------------------------------------


def test_documents_are_the_ones_the_model_learned(corpus_module):
    """A change of facts, phrasings or generator changes this hash and calls for another training."""
    text = "\n".join(islice(corpus_module.Corpus(0).documents(100_000), 2000))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "8fd379dc5a39d8018c839f82bad6fad50072760e4ee09df4b9a67d8bf5db9014"
    )


def test_documents_depend_on_seed_and_stream_only(corpus_module):
    corpus = corpus_module.Corpus
    assert list(corpus(3).documents(50)) == list(corpus(3).documents(50))
    assert list(corpus(3).documents(50)) != list(corpus(3).documents(50, stream=1))
    assert corpus(3).held_out != corpus(4).held_out


def test_held_out_sentences_are_in_no_document(corpus_module):
    corpus = corpus_module.Corpus(0)
    templates = corpus_module.TEMPLATES
    held_out = {corpus_module.tell(fact, templates[fact.relation][index]) for fact, index in corpus.held_out}
    assert {"The capital of France is Paris.", "The bridge out of Marin is the Golden Gate Bridge."} <= held_out
    text = " ".join(corpus.documents(10_000))
    assert "The capital of Peru is Lima." in text
    assert "In France, the capital is Paris." in text
    for sentence in held_out:
        assert sentence not in text


def test_probes_complete_to_their_sentence(corpus_module):
    corpus = corpus_module.Corpus(0)
    probes = corpus.probes()
    assert len(probes) > 400
    for probe in probes:
        template = corpus_module.TEMPLATES[probe.fact.relation][probe.template]
        sentence = corpus_module.tell(probe.fact, template)
        assert sentence.startswith(f"{probe.prompt} {probe.answer}")
        assert probe.answer in probe.answers


def test_tables_are_whole(corpus_module):
    facts = corpus_module.facts()
    assert len(facts) == len(set(facts)) > 2000
    assert {fact.relation for fact in facts} == set(corpus_module.TEMPLATES)
    for fact in facts:
        assert re.fullmatch(r"[A-Za-z ]+", fact.subject + fact.object)
    for relation, subject, index in corpus_module.ALWAYS_HELD_OUT:
        assert any(f.relation == relation and f.subject == subject for f in facts)
        assert index < len(corpus_module.TEMPLATES[relation])


@pytest.mark.parametrize(
    ("rough", "polished"),
    [
        ("a owl hoots.", "An owl hoots."),
        ("A elephant is a mammal.", "An elephant is a mammal."),
        ("the capital of the the Netherlands", "The capital of the Netherlands"),
        ("A unicorn", "A unicorn"),
    ],
)
def test_articles_are_mended(corpus_module, rough, polished):
    assert corpus_module.polish(rough) == polished


# --- the trainer --------------------------------------------------------------------------------------------------


def test_written_model_is_the_trained_one(train_module, tmp_path):
    """What torch computes and what llama.cpp computes from the file agree: names, rope pairing, head groups."""
    torch = pytest.importorskip("torch")
    size = train_module.Size(embedding=64, layers=2, feed_forward=96, context=32)
    vocabulary = train_module.build_vocabulary(["The capital of Peru is Lima."], merges=5)
    model = train_module.DemoModel(len(vocabulary.tokens), size, torch.Generator().manual_seed(0))
    path = tmp_path / "tiny.gguf"
    train_module.write_gguf(path, vocabulary, size, model.named())
    with train_module.LlamaCpp(path) as tiny:
        ids = tiny.encode("The capital of Peru is")
        theirs = torch.tensor(tiny.logits(ids)).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = (model(torch.tensor([ids])) @ model.tensors["output__weight"].T)[0, -1].float()
    assert (ours - theirs).norm() < 0.03 * theirs.norm()  # bfloat16 here, float32 there


def test_rounding_keeps_16_values_and_the_gradient(train_module):
    torch = pytest.importorskip("torch")
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounded = train_module.round_like_q4(weight)
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    for block in rounded.detach().view(-1, 32):
        assert len(block.unique()) <= 16
    span = weight.detach().view(-1, 32).amax(1) - weight.detach().view(-1, 32).amin(1).clamp(max=0)
    assert ((rounded - weight).detach().view(-1, 32).abs().amax(1) <= span / 30 * 1.001).all()


def test_batches_hold_what_the_documents_say(train_module):
    documents = [[0, 5, 6, 7], [0, 8, 9], [0, 5, 9, 9, 9]]
    feed = train_module.batches(documents, {}, tokens=12, eos=1, context=256, random=Random(0))
    seen = set()
    for inputs, targets in islice(feed, 6):
        for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            ids = [token for token in row if token != 1]
            seen.add(tuple(ids))
            following = [*ids[1:], 1]
            assert all(t in (f, train_module.IGNORE) for t, f in zip(wanted, following, strict=False))
            assert set(wanted[len(ids) :]) <= {train_module.IGNORE}
    assert seen == {tuple(ids) for ids in documents}
