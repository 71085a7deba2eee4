"""Language feature generation (§3.2, Eq. 7-8, Appendix B): prompt, answer, attention, LoRA."""
import json
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES
from safetensors.torch import load_file, save_file

import vlm
from annotations import InputError
from vlm import LanguageModel, instruction, parse_proposals, prefix_lm_mask, proposal_text


def make(lm_folder, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = LanguageModel(lm_folder, CLASSES, lora_rank=4, lora_alpha=8, **kwargs).eval()
    for name, parameter in model.named_parameters():                # LoRA's B starts at 0: make it count
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(lengths=(8,), L=8, D=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(len(lengths), L, D, generator=generator)
    mask = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    return f * mask[..., None], mask


def test_instruction_holds_every_label_with_its_description():
    text = instruction(CLASSES)
    for label, sentence in CLASSES.items():
        assert f"{label}: {sentence}" in text


def test_table9_without_descriptions_labels_remain():
    assert instruction({"Jump": "", "Run": ""}).endswith("include:\nJump\nRun")


def test_eq7_proposal_text_is_in_order_of_start_with_whole_frames():
    assert proposal_text([[60.4, 75.0], [11.6, 48.2]], ["Diving", "LongJump"]) == "LongJump: 12-48, Diving: 60-75."
    assert proposal_text([], []) == vlm.NO_ACTION
    assert proposal_text([[-1.6, 3.0]], ["Diving"]) == "Diving: 0-3."         # a feature sees beyond its window


def test_eq7_text_round_trip():
    text = proposal_text([[3, 9], [1, 5]], ["Run", "Jump"])
    assert parse_proposals(text, list(CLASSES)) == [("Jump", 1, 5), ("Run", 3, 9)]


@pytest.mark.parametrize("text, expected", [
    ("", []), (vlm.NO_ACTION, []), ("Jump", []), ("jump : 3 - 9", [("Jump", 3, 9)]), ("Fly: 1-2, Run: 5-3", [("Run", 5, 3)]),
    ("Run: 1-2, Run: 1-2", [("Run", 1, 2)] * 2), ("Run: 99999999999999-2", []), ("\x00\ud83d::--,,", []),
])
def test_parse_proposals_takes_whatever_a_language_model_writes(text, expected):
    assert parse_proposals(text, list(CLASSES)) == expected


@pytest.mark.parametrize("part", [" ", "Run ", "1", ":", "Run:", "Run: 1 ", "-", ", "])
def test_parse_proposals_takes_an_endless_answer(part):
    started = time.time()
    assert parse_proposals(part * 4000, ["Run"]) == [] and time.time() - started < 5


def test_prefix_lm_mask_by_hand():
    mask = prefix_lm_mask(torch.tensor([[True, False, True, True, True]]), prefix=3)[0, 0].int().tolist()
    assert mask == [[1, 0, 1, 0, 0],
                    [1, 1, 1, 0, 0],      # padding sees, and is seen by itself alone
                    [1, 0, 1, 0, 0],
                    [1, 0, 1, 1, 0],
                    [1, 0, 1, 1, 1]]


def test_prefix_zero_is_the_causal_mask():
    assert torch.equal(prefix_lm_mask(torch.ones(1, 4, dtype=torch.bool), 0)[0, 0], torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_language_features_depend_on_the_descriptions(lm_folder, layout):
    model, (f, mask) = make(lm_folder, layout=layout), inputs()
    before = model(f, mask)
    model.set_descriptions(dict(zip(CLASSES, reversed(CLASSES.values()))))
    after = model(f, mask)
    for a, b in zip(before[:3], after[:3]):
        assert (a - b).abs().max() > 1e-3


def test_under_a_causal_mask_frames_first_cannot_see_the_descriptions(lm_folder, monkeypatch):
    model, (f, mask) = make(lm_folder), inputs()
    monkeypatch.setattr(vlm, "prefix_lm_mask", lambda valid, prefix: prefix_lm_mask(valid, 0))
    before = model(f, mask)
    model.set_descriptions(dict(zip(CLASSES, reversed(CLASSES.values()))))
    after = model(f, mask)
    for a, b in zip(before[:3], after[:3]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_language_features_do_not_see_the_answer(lm_folder, layout):
    model, (f, mask) = make(lm_folder, layout=layout), inputs()
    plain = model(f, mask)
    for answer in ("Jump: 1-5.", "Run: 0-7, Throw: 2-3."):
        with_answer = model(f, mask, [answer])
        for a, b in zip(plain[:3], with_answer[:3]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_single_equals_batched_under_padding(lm_folder, layout):
    model = make(lm_folder, layout=layout)
    f, mask = inputs((5, 12), L=12)
    answers = ["Jump: 1-5.", "Run: 0-7, Throw: 2-3."]
    both, alone = model(f, mask, answers), model(f[:1, :8], mask[:1, :8], answers[:1])
    for a, b in zip(both[:3], alone[:3]):
        torch.testing.assert_close(a[:1, :5], b[:, :5], atol=1e-5, rtol=1e-5)


def test_the_three_special_tokens_give_three_features_of_the_right_shape(lm_folder):
    out = make(lm_folder)(*inputs((5, 8)))
    assert all(x.shape == (2, 8, 32) for x in out[:3])
    assert (out.f_lang_cls - out.f_lang_loc).abs().max() > 1e-3 and (out.f_lang_cls - out.f_adv).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_eq8_text_loss_is_the_cross_entropy_of_the_answer_tokens(lm_folder, layout):
    """Against transformers' own forward over the whole sequence, with every logit computed."""
    model, (f, mask) = make(lm_folder, layout=layout), inputs()
    answer = "Jump: 1-5, Run: 0-7."
    tokenize = lambda text: torch.tensor(model.tokenizer(text, add_special_tokens=False).input_ids)
    answer_ids = torch.cat([tokenize(answer), torch.tensor([model.tokenizer.eos_token_id])])
    frames, prompt = model.frame_tokens(f, mask)[0], model.embed(tokenize(instruction(CLASSES)))[None]
    first = [frames, prompt] if layout == "frames-first" else [prompt, frames]
    tokens = torch.cat([*first, model.embed(torch.cat([tokenize(vlm.ANSWER), answer_ids]))[None]], 1)
    N, prefix = tokens.size(1), frames.size(1) + prompt.size(1)
    seen = prefix_lm_mask(torch.ones(1, N, dtype=torch.bool), prefix if layout == "frames-first" else 0)
    logits = model.lm(inputs_embeds=tokens, attention_mask=seen).logits[0]
    expected = F.cross_entropy(logits[N - len(answer_ids) - 1:N - 1], answer_ids)
    torch.testing.assert_close(model(f, mask, [answer]).text_loss, expected, atol=1e-5, rtol=1e-5)


def test_eq8_text_loss_is_the_mean_over_all_answer_tokens_of_the_batch(lm_folder):
    model, (f, mask) = make(lm_folder), inputs((8, 8))
    answers = ["Jump: 1-5.", "No action."]
    count = [len(model.tokenizer(a).input_ids) + 1 for a in answers]
    one, two = (model(f[b:b + 1], mask[b:b + 1], [answers[b]]).text_loss for b in (0, 1))
    torch.testing.assert_close(model(f, mask, answers).text_loss, (one * count[0] + two * count[1]) / sum(count))


def test_only_lora_and_special_tokens_are_trained(lm_folder):
    trained = [n for n, p in make(lm_folder).named_parameters() if p.requires_grad]
    assert "special_tokens" in trained and all("lora_" in n for n in trained if n != "special_tokens")
    assert any("gate_proj.lora_A" in n for n in trained) and any("q_proj.lora_B" in n for n in trained)
    assert not any("lm_head" in n for n in trained)


def test_gradients_reach_lora_special_tokens_and_vision(lm_folder):
    model, (f, mask) = make(lm_folder).train(), inputs()
    f.requires_grad_()
    out = model(f, mask, ["Jump: 1-5."])
    (out.f_lang_cls.sum() + out.f_lang_loc.square().sum() + out.f_adv.square().sum() + out.text_loss).backward()
    assert f.grad.abs().sum() > 0 and (model.special_tokens.grad.abs().sum(1) > 0).all()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_tiny_tokenizer_gives_back_what_it_read(lm_folder):
    tokenizer = make(lm_folder).tokenizer
    for text in (instruction(CLASSES), "Jump: 12-48, Run: 60-75.", "unseen words, 3.14: \u00e9\u4e2d\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tiny_language_model_is_the_same_when_made_again(tmp_path):
    for name in "ab":
        vlm.make_tiny_lm(tmp_path / name, [instruction(CLASSES)], dim=16)
    for file in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_checkpointing_gives_the_same_gradients(lm_folder):
    gradients = []
    for checkpointing in (False, True):
        model, (f, mask) = make(lm_folder).train(), inputs((8, 5))
        if checkpointing:
            model.checkpointing()
        out = model(f.requires_grad_(), mask, ["Jump: 1-4.", vlm.NO_ACTION])
        (out.text_loss + out.f_adv.square().mean()).backward()
        gradients.append([f.grad] + [p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_bfloat16_is_frozen_only_and_close_to_float32(lm_folder):
    full, half = make(lm_folder), make(lm_folder, dtype="bfloat16")
    f, mask = inputs((8, 5))
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}
    a, b = full(f, mask, ["Jump: 1-4."] * 2), half(f, mask, ["Jump: 1-4."] * 2)
    assert b.f_adv.dtype == b.text_loss.dtype == torch.float32
    assert 0 < (a.f_adv - b.f_adv)[mask].abs().max() < 0.1 and abs(a.text_loss - b.text_loss) < 0.05


def test_descriptions_too_long_for_the_positions_are_an_error(lm_folder):
    model = make(lm_folder)
    room = model.lm.config.max_position_embeddings - len(model.prompt_ids) - 256
    assert model.sequence_length(8) == 32 + len(model.prompt_ids)
    model.check_length(room // 4)
    with pytest.raises(InputError, match="Shorten the sentences"):
        model.check_length(room // 4 + 1)


# ------------------------------------------------------------------------------------------- model folders
def as_internvl(lm_folder, folder, layout):
    """The tiny language model inside an InternVL folder: "native" layout, the one of older files, or the original."""
    shutil.copytree(lm_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    outer = {"native": {"model_type": "internvl", "text_config": config, "vision_config": {}},
             "older": {"model_type": "internvl", "text_config": config, "vision_config": {}},
             "original": {"model_type": "internvl_chat", "llm_config": config, "auto_map": {"AutoModel": "code.Run"}}}
    (folder / "config.json").write_text(json.dumps(outer[layout]))
    prefix = {"native": "model.language_model.", "older": "language_model.model.", "original": "language_model.model."}
    tensors = {prefix[layout] + n.removeprefix("model."): t
               for n, t in load_file(folder / "model.safetensors").items()}
    vision = {"vision_model.embeddings.class_embedding": torch.zeros(1, 1, 8), "mlp1.0.weight": torch.zeros(8)}
    save_file(tensors | vision, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["native", "older", "original"])
def test_the_language_model_is_taken_out_of_an_internvl_folder(lm_folder, tmp_path, layout):
    folder = as_internvl(lm_folder, tmp_path / layout, layout)
    f, mask = inputs()
    plain, taken = make(lm_folder)(f, mask, ["Jump: 1-4."]), make(folder)(f, mask, ["Jump: 1-4."])
    for a, b in zip(plain, taken):
        torch.testing.assert_close(a, b)


def test_tied_embeddings_give_the_output_layer(lm_folder):
    model, _ = vlm.load_language_model(lm_folder, torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_missing_or_misshapen_weight_is_an_error_that_names_it(lm_folder, tmp_path):
    shutil.copytree(lm_folder, tmp_path / "lm")
    path = tmp_path / "lm/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, path, {"format": "pt"})
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        vlm.load_language_model(tmp_path / "lm", torch.float32)
    save_file(tensors | {name: tensors[name][:, :3].contiguous()}, path, {"format": "pt"})
    with pytest.raises(InputError, match="lm: expected"):
        vlm.load_language_model(tmp_path / "lm", torch.float32)


@pytest.mark.parametrize("content, message", [
    (None, "no such folder"), ("{", "config.json"), ('{"model_type": "of_the_future"}', "of_the_future"),
    ('{"model_type": "qwen2", "hidden_size": 8}', "expected weights and tokenizer")])
def test_what_is_no_language_model_is_an_error_that_names_the_folder(tmp_path, content, message):
    folder = tmp_path / "lm"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        vlm.load_language_model(folder, torch.float32)
    assert str(folder) in str(caught.value)


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


ANSWERS = ["Jump: 1-5, Run: 6-7.", "Run: 2-4."]


def test_generate_writes_what_it_was_trained_to_write(writer):
    model, f_vis, mask = writer
    assert model.generate(f_vis, mask) == ANSWERS


def test_generate_one_window_alone_and_under_more_padding_writes_the_same(writer):
    model, f_vis, mask = writer
    assert [model.generate(f_vis[b:b + 1, :n], mask[b:b + 1, :n])[0] for b, n in enumerate((8, 5))] == ANSWERS
    assert model.generate(F.pad(f_vis, (0, 0, 0, 3), value=9.0), F.pad(mask, (0, 3))) == ANSWERS


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_generate_is_the_argmax_of_the_teacher_forced_logits(lm_folder, layout, monkeypatch):
    model = make(lm_folder, layout=layout)                           # untrained: writes anything, and does not end
    f_vis, mask = inputs((8, 5))
    ids, decode = [], model.tokenizer.batch_decode
    monkeypatch.setattr(model.tokenizer, "batch_decode", lambda rows, **kw: ids.extend(rows) or decode(rows, **kw))
    texts = model.generate(f_vis, mask, max_new_tokens=12)
    assert all(len(row) == 12 and text.endswith(vlm.CUT) for row, text in zip(ids, texts))
    lead = model.tokenizer(vlm.ANSWER, add_special_tokens=False).input_ids
    answer = torch.tensor([lead + row for row in ids])
    tokens, valid = model.sequence(f_vis, mask, answer, torch.ones_like(answer, dtype=torch.bool))
    with torch.no_grad():
        hidden = model.hidden_states(tokens, valid, model.attention(valid, 8))
        logits = model.lm.get_base_model().lm_head(hidden[:, -13:-1])
    assert logits.argmax(-1).tolist() == ids
