"""Localization as question answering (Table 2): generation, reading, hallucinations, the command."""
import json
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES
from conftest import language_inputs as inputs
from conftest import language_model as make

import train
from data import TALDataset
from experiments import question_answering
from experiments.question_answering import CUT, generate, parse_proposals
from support.annotations import Video
from vlm import ANSWER, NO_ACTION, proposal_text

# ---------------------------------------------------------------- what is read
def test_eq7_text_round_trip():
    text = proposal_text([[3, 9], [1, 5]], ["Run", "Jump"])
    assert parse_proposals(text, list(CLASSES)) == [("Jump", 1, 5), ("Run", 3, 9)]


LABELS = ["board:chopping", "chopping", "oil", "oil:olive", "pass, long", "cut; mix", "No. 7", "run ", "run", "Run", "12-48", " 7",
          'say "a"', "a  b", "éléphant", "a", "A: 1"]


def test_labels_with_marks_digits_blanks_and_common_beginnings_come_back():
    times = [[3 * i, 3 * i + 2] for i in range(len(LABELS))]
    assert parse_proposals(proposal_text(times, LABELS), LABELS) == [(name, *time) for name, time in zip(LABELS, times)]
    assert parse_proposals(proposal_text(times, LABELS).upper(), ["oil", "OIL:OLIVE"]) == [("oil", 6, 8), ("OIL:OLIVE", 9, 11)]


def test_every_answer_in_any_labels_comes_back():
    """Labels of up to 7 random pieces, too short for one to hold a whole entry of another."""
    draw = random.Random(0)
    pieces = ["a", "b", "B", "1", "48", "-", ":", ",", ".", ";", " ", "\n", "'", '"', "é", "ß", "中", "(", "|", "\\"]
    for _ in range(1000):
        labels = {"".join(draw.choices(pieces, k=draw.randint(1, 7))) for _ in range(draw.randint(1, 6))} - {" ", "\n"}
        rows = sorted((*sorted(draw.choices(range(60), k=2)), draw.choice(sorted(labels) or ["a"])) for _ in range(draw.randint(1, 5)))
        text = proposal_text([row[:2] for row in rows], [row[2] for row in rows])
        assert parse_proposals(text, sorted(labels | {"a"})) == [(label, start, end) for start, end, label in rows], text


@pytest.mark.parametrize("text, expected", [
    ("", []), (NO_ACTION, []), ("Jump", []), ("jump : 3 - 9", [("Jump", 3, 9)]), ("Fly: 1-2, Run: 5-3", [("Run", 5, 3)]),
    ("Run: 1-2, Run: 1-2", [("Run", 1, 2)] * 2), ("Fly and run: 1-2 run: 3-4;JUMP:5-6", [("Run", 3, 4), ("Jump", 5, 6)]), ("Run: 99999999999999-2", []), ("\x00\ud83d::--,,", []),
])
def test_parse_proposals_takes_whatever_a_language_model_writes(text, expected):
    assert parse_proposals(text, list(CLASSES)) == expected


@pytest.mark.parametrize("part", [" ", "Run ", "1", ":", "Run:", "Run: 1 ", "-", ", "])
def test_parse_proposals_takes_an_endless_answer(part):
    started = time.time()
    assert parse_proposals(part * 4000, ["Run"]) == [] and time.time() - started < 5


def test_hallucination_rates_by_hand():
    texts = ["Run: 1-5.", "Run: 1-5.", "Run: 2-5, Run: 2-5, Run: 2-5.", "Jump: 9-3.", "Jump: 3-12.", "Jump: 3-9" + CUT,
             "No action.", "No action.", "Jump: 2-3, Run: 2-3.", "\x00\ud83d ::"]
    answers = [dict(text=text, proposals=parse_proposals(text, ["Run", "Jump"]), length=8) for text in texts]
    rates = question_answering.hallucination_rates(answers, beyond=2)
    assert rates == {"fixed": 0.4, "infinite": 0.2}                      # 0, 1, 3, 4, and 2, 5


# ---------------------------------------------------------------- what is written
ANSWERS = ["Jump: 1-5, Run: 6-7.", "Run: 2-4."]


@pytest.fixture(scope="module", params=["frames-first", "text-first"])
def writer(request, lm_folder):
    """A model that was trained for some steps to write one answer for each of two windows."""
    model = make(lm_folder, layout=request.param)
    f_vis, mask = inputs((8, 5))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(f_vis, mask, ANSWERS).text_loss.backward()
        optimizer.step()
    return model, f_vis, mask


def test_generate_writes_what_it_was_trained_to_write(writer):
    assert generate(*writer) == ANSWERS


def test_generate_one_window_alone_and_under_more_padding_writes_the_same(writer):
    model, f_vis, mask = writer
    assert [generate(model, f_vis[b:b + 1, :n], mask[b:b + 1, :n])[0] for b, n in enumerate((8, 5))] == ANSWERS
    assert generate(model, F.pad(f_vis, (0, 0, 0, 3), value=9.0), F.pad(mask, (0, 3))) == ANSWERS


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_generate_is_the_argmax_of_the_teacher_forced_logits(lm_folder, layout, monkeypatch):
    model = make(lm_folder, layout=layout)                           # untrained: writes anything, and does not end
    f_vis, mask = inputs((8, 5))
    ids, decode = [], model.tokenizer.batch_decode
    monkeypatch.setattr(model.tokenizer, "batch_decode", lambda rows, **kw: ids.extend(rows.tolist()) or decode(rows, **kw))
    texts = generate(model, f_vis, mask, max_new_tokens=12)
    assert all(len(row) == 12 and text.endswith(CUT) for row, text in zip(ids, texts))
    lead = model.tokenizer(ANSWER, add_special_tokens=False).input_ids
    answer = torch.tensor([lead + row for row in ids])
    tokens, valid = model.sequence(f_vis, mask, answer, torch.ones_like(answer, dtype=torch.bool))
    with torch.no_grad():
        logits = model.logits(model.hidden_states(tokens, valid, model.prefix(8))[:, -13:-1])
    assert logits.argmax(-1).tolist() == ids


# ---------------------------------------------------------------- answers as detections
class Model:
    """In place of an ActionVLM, whose language model writes nothing of its own."""
    config, multiple, language = SimpleNamespace(classes=["Run", "Jump"]), 1, None

    def eval(self):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def visual(self, batch):
        return batch.inputs


def test_answers_become_detections_in_seconds(tmp_path, monkeypatch):
    np.save(tmp_path / "v.npy", np.zeros((12, 3), np.float32))
    video = Video("v", 12.0, 2.0, path=tmp_path / "v.npy")               # one step a half second; windows 0-7 and 4-11
    test = TALDataset([video], ["Run", "Jump"], window=8)
    args = SimpleNamespace(batch_size=2, workers=0, nms_sigma=0.5, voting=0.0, max_per_class=0, max_per_video=200,
                           external_scores=None)

    def answer(*texts):
        monkeypatch.setattr(question_answering, "generate", lambda language, f_vis, mask, max_new_tokens: list(texts))
        predictions, answers = question_answering.answer(Model(), test, args)
        return predictions["v"], answers
    found, answers = answer("Run: 1-3, Jump: 4-6.", "No action.")
    assert [a["start"] for a in answers] == [0, 4] and answers[0]["length"] == 8
    assert answers[0]["proposals"] == [("Run", 1, 3), ("Jump", 4, 6)] and answers[1]["proposals"] == []
    assert found["labels"] == ["Run", "Jump"]
    np.testing.assert_allclose(found["segments"], [[0.5, 1.5], [2, 3]])
    np.testing.assert_allclose(found["scores"], [1, 0.5])
    late, _ = answer("nothing", "Jump: 2-4.")
    np.testing.assert_allclose(late["segments"], [[3, 4]])               # its window starts at step 4
    none, _ = answer("", "")
    assert none["labels"] == [] and none["segments"].shape == (0, 2)


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of train.py for an untrained model on random features, all but --out."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    database = {}
    for name, subset in (("a", "Train"), ("b", "Train"), ("c", "Val")):
        np.save(folder / f"{name}.npy", rng.normal(size=(40, 6)).astype(np.float32))
        database[name] = {"subset": subset, "duration": 10.7, "fps": 15, "annotations": [
            {"label": "Run", "segment": [1, 3]}, {"label": "Jump", "segment": [5, 6.5]}]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    (folder / "descriptions.json").write_text(json.dumps({"Run": "Legs alternate.", "Jump": "Both feet leave the ground."}))
    return [*map(str, ["--dataset", "custom", "--features", folder, "--annotations", folder / "annotations.json",
                       "--descriptions", folder / "descriptions.json", "--train-subset", "train", "--test-subset", "val",
                       "--window", 32, "--levels", 3, "--width", 16, "--epochs", 0, "--lora-rank", 4, "--device", "cpu"])]


def command(run, *more):
    return question_answering.main(["--checkpoint", str(run), "--device", "cpu", "--max-new-tokens", "8", *map(str, more)])


def test_question_answering_writes_answers_rates_and_histogram(flags, tmp_path, capsys):
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert command(tmp_path / "run", "--out", tmp_path / "qa", "--json", tmp_path / "f.json") == 0
    printed = capsys.readouterr().out
    assert "| mAP" in printed and "LAP" in printed and "hallucinations in 2 windows" in printed
    assert {p.name for p in (tmp_path / "qa").iterdir()} == {"answers.json", "boundaries.png", "result-qa.json"}
    figures = json.loads((tmp_path / "f.json").read_text())
    assert set(figures["hallucination"]) == {"fixed", "infinite"} and isinstance(figures["LAP"], float)
    answers = json.loads((tmp_path / "qa/answers.json").read_text())
    assert [a["video"] for a in answers] == ["c", "c"] and all(a["text"] is not None for a in answers)


def test_question_answering_wants_a_model_with_language(flags, tmp_path, capsys):
    assert train.main([*flags, "--lambda-lang", "0", "--out", str(tmp_path)]) == 0
    assert command(tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("question_answering.py: error: ") and "expected a model with language" in error


def test_boundaries_are_drawn_even_without_proposals(tmp_path):
    for name, proposals in (("none", []), ("some", [("Run", 1, 3), ("Jump", 3, 20)])):
        question_answering.boundaries(tmp_path / f"{name}.png", proposals)
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("flags, part", [(["--checkpoint", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
                                         (["--max-new-tokens", "9"], "--checkpoint")])
def test_flags_out_of_range(flags, part, capsys):
    with pytest.raises(SystemExit):
        question_answering.main(flags)
    assert part in capsys.readouterr().err
