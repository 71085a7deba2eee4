"""The small language model of `--lm tiny`: its folder, and the command that made it."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from support import tiny_lm
from support.language_models import TINY_LM, load_language_model
from vlm import instruction, proposal_text

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shipped():
    return load_language_model("tiny", torch.float32)


def test_the_folder_is_small_and_says_how_it_was_made():
    files = {path.name: path.stat().st_size for path in TINY_LM.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files) and sum(files.values()) <= 4e6
    text = (TINY_LM / "README.md").read_text()
    assert "python -m support.tiny_lm" in text and "held-out" in text


def test_its_tokenizer_takes_any_text(shipped):
    tokenizer = shipped[1]
    for text in (instruction({"Überschlag": "word: 3.14, \u4e2d\u6587"}), "Jump: 12-48, Run: 60-75.", "\n a\tb "):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer("1234").input_ids) == 4 and tokenizer.eos_token_id is not None                # digit by digit


def test_it_has_read_our_descriptions(shipped):
    """Its loss on an instruction of the demo is far below that of a model which knows only how often each token comes."""
    model, tokenizer = shipped
    ids = torch.tensor([tokenizer(instruction(json.loads((ROOT / "descriptions/demo.json").read_text()))).input_ids])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    counts = torch.bincount(ids[0]).float()
    share = counts[counts > 0] / counts.sum()
    assert loss < 0.6 * -(share * share.log()).sum().item()


def test_held_out_sentences_are_not_read():
    sets, held_out = tiny_lm.read_descriptions()
    assert len(sets) == len(list((ROOT / "descriptions").glob("*.json"))) and len(held_out) > 20
    read = {f"{label}: {sentence}" for some in sets for label, sentence in some.items()}
    assert not read & set(held_out) and len(read) > 15 * len(held_out)


def test_the_command_writes_a_model_that_loads(tmp_path, capsys):
    tiny_lm.main(["--steps", "2", "--out", str(tmp_path)])
    assert "held-out sentences" in capsys.readouterr().out
    model, tokenizer = load_language_model(tmp_path, torch.float32)
    assert model.config.hidden_size == 128 and tokenizer(proposal_text([[1, 2]], ["a"])).input_ids


@pytest.mark.parametrize("prefix", [0, 4 * tiny_lm.FRAMES], ids=["causal", "prefix"])
def test_its_placeholders_look_back_at_their_frame(shipped, lm_folder, monkeypatch, prefix):
    """16 vectors: guessing has the loss ln 16 = 2.77. The random model of the tests has not learnt to look back."""
    torch.manual_seed(1)
    assert tiny_lm.frame_loss(shipped[0], prefix).item() < 0.5
    monkeypatch.setattr(tiny_lm, "DIM", 32)
    random = load_language_model(lm_folder, torch.float32)[0]
    assert tiny_lm.frame_loss(random, prefix).item() > 2.5


def test_frame_loss_by_hand(monkeypatch):
    """A model that returns the vectors themselves at the placeholders: own cosine 1, two others about c."""
    for name, value in (("BATCH", 1), ("FRAMES", 3), ("DIM", 8)):
        monkeypatch.setattr(tiny_lm, name, value)
    torch.manual_seed(0)
    v = F.normalize(torch.randn(1, 3, 1, 8), dim=-1)[0, :, 0]
    torch.manual_seed(0)
    embedding = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0, 2.0], [0.0, 2.0]]))
    copy = SimpleNamespace(get_input_embeddings=lambda: embedding, model=lambda inputs_embeds, attention_mask: SimpleNamespace(
        last_hidden_state=inputs_embeds.unflatten(1, (3, 4))[:, :, :1].expand(-1, -1, 4, -1).flatten(1, 2)))
    expected = F.cross_entropy(10 * v @ v.T, torch.arange(3))
    torch.testing.assert_close(tiny_lm.frame_loss(copy, 0), expected)
