"""Models of texts: the tokeniser against the library's, the encoder from torch to ONNX, a whole run, and what serving must not need."""
import json, math, subprocess, sys, textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from slml_nb.core import SlmlError
from slml_nb.model import load_model, metrics_of
from slml_nb.text import WordPiece, eight_bits, fit_encoder, fit_tfidf, load_body, looked_at, weights_folder

root = Path(__file__).resolve().parent.parent
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ß好的éσи"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *"!?.,'-«😀", "good", "bad", "not", "un", "##ing", "##able", "is", "the", "box"]
SPEC = {"task": "classification", "target": "mood", "classes": ["blame", "praise"], "features": ["review"]}
ODD = ["", " \n ", "😀😀 👍🏽", "zzzz", "x" * 100_000, "good " * 20_000, "\x00\ufffd\u200b", "ÀÉ ß İ", "的好"]


def reviews(n, seed=0):
    "Short reviews and whether they praise."
    r = np.random.default_rng(seed)
    y = r.integers(0, 2, n)
    return [f"the {'box' if r.random() < 0.5 else 'phone'} is {['bad', 'good'][k]}{'!' * r.integers(0, 6)}" for k in y], y.astype(float)


def library(lowercase=True, strip=None):
    "The tokeniser of the library, with our small vocabulary."
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(VOCABULARY)}, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = tokenizers.normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=strip, lowercase=lowercase)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def random_weights(folder, kind="Bert", **size):
    "An encoder of two layers with random weights, as a folder that transformers has saved."
    transformers = pytest.importorskip("transformers")
    import torch
    torch.manual_seed(0)
    size = size or dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(VOCABULARY), max_position_embeddings=64, **size)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=library(), pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory): return random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def unsaved(monkeypatch):
    "For tests that look at the training alone: writing the graph takes longer than that."
    for name, made in (("text_onnx", b""), ("save_encoder", None)): monkeypatch.setattr(f"slml_nb.text.{name}", lambda *_, made=made: made)


def trained(weights, folder, frozen, n=300, spec=SPEC, metric="log_loss", **more):
    "An encoder on made-up reviews: what predicts, what was learnt, the model as it was saved (None: it was not), the validation rows."
    how = dict(epochs=2, batch=16, lr=2e-3, patience=0, max_seconds=0, seed=0) | more
    train, valid = reviews(n), reviews(60, seed=1)
    if not spec["classes"]: train, valid = ((t, 1 + 4 * y) for t, y in (train, valid))
    say, learnt = fit_encoder(folder, spec, train, valid, metric, weights, frozen, 40, **how)
    return say, learnt, load_model(folder) if (folder / "model.json").exists() else None, valid


# What needs no library

def test_serving_needs_no_scikit_learn_no_scipy_no_torch(tmp_path):
    texts, y = reviews(200)
    say, _ = fit_tfidf(tmp_path / "m", SPEC, (texts, y), ([], np.zeros(0)), "log_loss")
    code = textwrap.dedent(f"""
        import sys
        for name in ("sklearn", "scipy", "torch", "transformers", "pandas", "lightgbm"): sys.modules[name] = None
        import json, slml_nb.text
        from slml_nb.model import load_model
        print(json.dumps(load_model({str(tmp_path / "m")!r}).predict({{"review": {texts[:5] + ODD[:4]!r}}}).tolist()))""")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert np.allclose(json.loads(done.stdout), say(texts[:5] + ODD[:4]), atol=1e-7)


def test_without_transformers_the_message_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SlmlError, match=r"slml_nb\[text\]"): load_body("minilm")


# The tokeniser

@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.text(st.sampled_from("abcdgonuxABXÉéİßΣσИи 0 9!?.,'«»“”…-\t\n\r\x00\x07\ufffd\u00a0\u3000\u200b\u0301好的😀👍") | st.characters(max_codepoint=0x0527, categories=["Lu", "Ll", "Mn", "Nd", "Po", "Zs", "Cc", "Sc"]), max_size=40), st.booleans(), st.sampled_from([None, True, False]))
def test_pieces_are_those_of_the_library(text, lowercase, strip):
    theirs = library(lowercase, strip)
    theirs.enable_truncation(16)
    ours = WordPiece(VOCABULARY, lowercase, lowercase if strip is None else strip, 16)
    assert ours(text) == theirs.encode(text).ids


# The encoder

@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_saved_answers_as_what_was_trained(weights, tmp_path, frozen):
    say, learnt, model, valid = trained(weights, tmp_path / "m", frozen)
    texts = valid[0] + ODD
    p = say(texts)
    assert p.shape == (len(texts), 2) and np.isfinite(p).all() and np.allclose(p.sum(1), 1, atol=1e-5)
    assert np.abs(model.predict({"review": texts}) - p).max() < 1e-5
    for t, expected in zip(texts[-12:], p[-12:]): assert np.abs(model.predict({"review": [t]})[0] - expected).max() < 1e-5
    assert np.abs(model.predict({"review": [None]}) - say([""])).max() < 1e-5
    assert metrics_of("classification", valid[1], say(valid[0]))["accuracy"] > 0.9
    assert [h["epoch"] for h in learnt["history"]] == ([] if frozen else [0, 1, 2])
    assert not any(str(root) in (tmp_path / "m" / f).read_bytes().decode(errors="ignore") for f in ("model.onnx", "model.json"))


@pytest.mark.slow
def test_a_relative_of_bert(tmp_path):
    weights = random_weights(tmp_path / "weights", "DistilBert", dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    say, learnt, model, valid = trained(weights, tmp_path / "m", False, n=100, epochs=1)
    assert np.abs(model.predict({"review": valid[0] + ODD}) - say(valid[0] + ODD)).max() < 1e-5
    assert looked_at(learnt["network"], learnt["cut"], "the box")


@pytest.mark.slow
def test_same_seed_same_answers(weights, tmp_path, unsaved):
    a, b = (trained(weights, tmp_path / n, False, n=80, epochs=1)[0](reviews(20, seed=3)[0]) for n in "ab")
    assert np.array_equal(a, b)


@pytest.mark.slow
def test_a_rating_comes_in_its_unit(weights, tmp_path):
    say, _, model, valid = trained(weights, tmp_path / "m", False, spec={**SPEC, "task": "regression", "classes": []}, metric="mae")
    assert np.abs(model.predict({"review": valid[0] + ODD}) - say(valid[0] + ODD)).max() < 1e-4
    assert metrics_of("regression", valid[1], say(valid[0]))["mae"] < 1.0  # stars from 1 to 5; the median is off by 2


@pytest.mark.slow
def test_a_loss_that_explodes_is_said(weights, tmp_path, unsaved):
    with pytest.raises(SlmlError, match="lower lr"): trained(weights, tmp_path / "m", False, n=60, lr=math.inf)


@pytest.mark.slow
def test_worse_passes_are_not_kept(weights, tmp_path, unsaved):
    say, learnt, _, valid = trained(weights, tmp_path / "m", False, n=60, lr=5.0, epochs=3, patience=1)
    frozen, *_ = trained(weights, tmp_path / "f", True, n=60)
    best = min(learnt["history"], key=lambda h: h["valid"])
    assert best["epoch"] > 0 or np.allclose(say(valid[0]), frozen(valid[0]), atol=1e-5)
    assert math.isclose(metrics_of("classification", valid[1], say(valid[0]))["log_loss"], best["valid"], rel_tol=1e-3)


@pytest.mark.slow
def test_eight_bits_are_smaller_and_nearly_the_same(weights, tmp_path):
    say, _, model, valid = trained(weights, tmp_path / "encoder", True)
    small = eight_bits(tmp_path / "encoder", tmp_path / "small", "encoder_int8")
    assert small.name == "encoder_int8" and np.abs(small.predict({"review": valid[0]}) - say(valid[0])).max() < 0.1
    assert np.array_equal(load_model(tmp_path / "small").predict({"review": valid[0]}), small.predict({"review": valid[0]}))


@pytest.mark.slow
def test_twelve_rows_and_no_validation_rows(weights, tmp_path, unsaved):
    for i, (texts, y) in enumerate([reviews(12), ([""] * 12, np.arange(12.0) % 2), (["😀"] * 3, np.array([0.0, 1.0, 1.0]))]):
        say, _ = fit_encoder(tmp_path / str(i), SPEC, (texts, y), ([], np.zeros(0)), "log_loss", weights, True, 40, epochs=1, batch=16, lr=1e-3, patience=1, max_seconds=0, seed=0)
        assert np.isfinite(say(texts + ODD)).all()


@pytest.mark.slow
def test_attention_is_shared_out_over_the_words(weights, tmp_path, unsaved):
    _, learnt, _, _ = trained(weights, tmp_path / "m", True, n=60)
    words = looked_at(learnt["network"], learnt["cut"], "The box isn't unable!")
    assert [w for w, _ in words] == ["the", "box", "isn", "'", "t", "unable", "!"] and math.isclose(sum(s for _, s in words), 1, rel_tol=1e-5)
    assert looked_at(learnt["network"], learnt["cut"], "") == []


@pytest.mark.slow
def test_weights_that_cannot_be_used_are_named(weights, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SlmlError, match="no encoder could be read"): load_body(str(tmp_path / "empty"))
    stored = json.loads((Path(weights) / "tokenizer.json").read_text())
    import shutil
    shutil.copytree(weights, tmp_path / "other")
    stored["model"] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {"a": 0, "[PAD]": 1, "[UNK]": 2, "[CLS]": 3, "[SEP]": 4, "[MASK]": 5}, "merges": []}
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(SlmlError, match="WordPiece"): load_body(str(tmp_path / "other"))


@pytest.mark.slow
def test_the_real_minilm_knows_what_words_mean(tmp_path):
    transformers = pytest.importorskip("transformers")
    try: where = weights_folder("minilm")
    except SlmlError: pytest.skip("the package with the weights is not installed")
    from slml_nb.text import apply_text, text_network
    body, cut = load_body("minilm", 64)
    theirs = transformers.AutoTokenizer.from_pretrained(where)
    sentences = ["I could not be happier.", "I am very satisfied!", "It broke after two days…", "It fell apart within a week.", "Don't buy; $9.99 wasted — naïve façade, 好的 😀", *ODD[:4], *ODD[6:]]
    for s in sentences: assert cut(s) == theirs(s, truncation=True, max_length=64)["input_ids"], s
    v = apply_text(text_network(body, 2), "vectors", [cut(s) for s in sentences[:4]])
    alike = v @ v.T / body.config.hidden_size  # cosines
    assert np.allclose(np.diag(alike), 1, atol=1e-4) and alike[0, 1] > 2 * alike[0, 2] and alike[2, 3] > 2 * alike[1, 3]


# What decides whether the stage runs again

def test_other_weights_in_the_same_folder_are_another_key(tmp_path):
    from slml_nb.graph import read_stage
    from slml_nb.run import outside_data
    from slml_nb.stage import shipped_notebooks
    node, folder = read_stage("text", shipped_notebooks()["text"]), tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    mark = lambda: outside_data(node, {"encoder": str(folder)})
    first = mark()
    assert list(first) == [str(folder)] and mark() == first
    (folder / "model.safetensors").write_bytes(b"two")
    assert mark() != first
    assert outside_data(node, {"encoder": ""}) == {} and outside_data(node, {"encoder": "minilm"}) == outside_data(node, {"encoder": "minilm"})


# A whole run

@pytest.mark.slow
def test_a_run_from_a_csv(project):
    texts, y = reviews(240)
    lines = [f'"{t} number {i}",{["blame", "praise"][int(k)]}' for i, (t, k) in enumerate(zip(texts, y))]
    project.write("reviews.csv", "review,mood\n" + "\n".join(lines) + "\n")
    project.write("params/r.yaml", "project: r\nframe: {decision: whom to call, target: mood, time: '', known_later: [], task: classification, metric: log_loss}\ningest: {sources: [reviews.csv]}\n"
                  "features: {text: [review]}\ntext: {}\nevaluate: {n_boot: 50, requests: 20}\n")
    code, record = project.run("params/r.yaml")
    assert record["stages"]["text"]["state"] == "made", record["stages"]
    assert code in (0, 3) and record["stages"]["serve"]["state"] == "made", record
    verdict = json.loads(next(project.folder.glob("runs/.store/**/verdict.json")).read_text())
    assert "tfidf" in {c["name"] for c in verdict["candidates"]}


@pytest.mark.slow
def test_a_run_without_validation_rows_and_with_every_reason_to_stop(project):
    base = "project: r\nframe: {decision: whom to call, target: mood, time: '', known_later: [], task: classification, metric: log_loss}\ningest: {sources: [reviews.csv]}\n"
    rows = lambda say: "review,mood\n" + "".join(f'"{say(i)}",{["blame", "praise"][i % 2]}\n' for i in range(40))
    project.write("reviews.csv", rows(lambda i: f"the box number {i} is fine"))
    project.write("params/r.yaml", base + "sample: {shares: {train: 0.9, valid: 0.0, test: 0.1}}\ntext: {}\n")
    code, record = project.run("params/r.yaml", "--to", "text")
    assert code == 0, record
    found = [f["text"] for f in json.loads(next(project.folder.glob("runs/r/*/text/made.json")).read_text())["findings"]]
    assert any("no rows that could be compared" in f for f in found) and any("features: {text: [review]}" in f for f in found)


@pytest.mark.slow
def test_a_changed_weight_runs_the_stage_again(project, weights):
    import shutil
    shutil.copytree(weights, project.folder / "weights")
    texts, y = reviews(80)
    project.write("reviews.csv", "review,mood\n" + "".join(f'"{t} number {i}",{["blame", "praise"][int(k)]}\n' for i, (t, k) in enumerate(zip(texts, y))))
    project.write("params/r.yaml", "project: r\nframe: {decision: whom to call, target: mood, time: '', known_later: [], task: classification, metric: log_loss}\ningest: {sources: [reviews.csv]}\n"
                  "features: {text: [review]}\ntext: {encoder: weights, max_length: 40}\n")
    code, record = project.run("params/r.yaml", "--to", "text")
    assert code == 0 and record["stages"]["text"]["state"] == "made", record
    plan = lambda: {p["stage"]: p["state"] for p in project.run("params/r.yaml", "--to", "text", "--dry-run")[1]["plan"]}
    assert plan()["text"] == "reused"
    file = project.folder / "weights/model.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    found = plan()
    assert found["text"] != "reused" and found["features"] == "reused"


# Any number of cores

BITS = """
import hashlib
from pathlib import Path
import numpy as np
from slml_nb.text import fit_encoder, fit_tfidf
SPEC = dict(task="classification", target="mood", classes=["blame", "praise"], features=["review"])
def reviews(n, seed, words):
    "What somebody might have written, and whether they praise."
    r = np.random.default_rng(seed)
    y = r.integers(0, 2, n)
    return [" ".join(r.choice(words, r.integers(5, 25))) + (" good" if k else " bad") for k in y], y.astype(float)
def show(folder, said):
    "What was made and what it says."
    for p in sorted(Path(folder).iterdir()): print(p.name, hashlib.sha256(p.read_bytes()).hexdigest())
    print(hashlib.sha256(said.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_same_bits_on_one_core_and_on_all(weights, tmp_path):
    "Counted words, with more terms than a library adds up in one thread; and an encoder whose head is learnt first and then everything."
    from test_fleet import on_one_core_and_on_all
    one, every = on_one_core_and_on_all(BITS + f"""
many = [f"word{{i:04}}" for i in range(3000)]
train, valid = reviews(1500, 0, many), reviews(200, 1, many)
for name, spec, metric in (("classes", SPEC, "log_loss"), ("number", dict(SPEC, task="regression", classes=[]), "mae")):
    say, _ = fit_tfidf(Path({str(tmp_path)!r}) / name, spec, train, valid, metric)
    show(Path({str(tmp_path)!r}) / name, say(valid[0]))
few = ["the", "box", "is", "not", "un", "!", "good"]
train, valid = reviews(400, 0, few), reviews(60, 1, few)
say, _ = fit_encoder(Path({str(tmp_path)!r}) / "encoder", SPEC, train, valid, "log_loss", {weights!r}, False, 40, epochs=2, batch=128, lr=2e-3, patience=0, max_seconds=0, seed=0)
show(Path({str(tmp_path)!r}) / "encoder", say(valid[0]))
""")
    assert one == every and len(one) == 10
