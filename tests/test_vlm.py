"""Language feature generation (§3.2, Eq. 7-8, Appendix B): prompt, answer, attention, LoRA."""
import json
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

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
    original = model.visibility
    monkeypatch.setattr(model, "visibility", lambda *args: original(*args)._replace(causal=True))
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


def llama_folder(lm_folder, folder):
    """A tiny Llama with the tokenizer of the tiny Qwen2."""
    shutil.copytree(lm_folder, folder)
    sizes = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{k: sizes[k] for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "eos_token_id",
        "num_key_value_heads", "max_position_embeddings")}, initializer_range=0.2)).save_pretrained(folder)
    return folder


def dense_hidden_states(model, layout, L):
    """In place of `hidden_states`: transformers' own attention with a mask of N x N."""
    def hidden_states(tokens, valid, visibility, cache):
        base = model.lm.get_base_model()
        base.set_attn_implementation("eager")
        mask = prefix_lm_mask(valid, model.sequence_length(L) if layout == "frames-first" else 0)
        position = (valid.cumsum(1) - 1).clamp(min=0)
        hidden = base.model(inputs_embeds=tokens, position_ids=position, use_cache=False,
                            attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e9)).last_hidden_state
        base.set_attn_implementation("prefix")
        return hidden
    return hidden_states


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("lengths, answers", [((8, 8), None), ((8, 5), None), ((8, 8), ["Jump: 1-4.", "No action."]),
                                              ((8, 5), ["Jump: 1-4, Run: 2-3.", "No action."])])
@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_attention_in_parts_is_attention_with_a_dense_mask(lm_folder, tmp_path, monkeypatch, layout, lengths, answers,
                                                           architecture):
    """Features, loss and gradients; in parts with activation checkpointing, which calls the layers again."""
    folder = lm_folder if architecture == "qwen2" else llama_folder(lm_folder, tmp_path / "llama")
    results = []
    for dense in (True, False):
        model, (f, mask) = make(folder, layout=layout).train(), inputs(lengths)
        if dense:
            monkeypatch.setattr(model, "hidden_states", dense_hidden_states(model, layout, 8))
        else:
            model.checkpointing()
        out = model(f.requires_grad_(), mask, answers, padded=min(lengths) < 8)
        loss = (torch.cat(out[:3], -1)[mask] ** 2).mean() + (out.text_loss if answers else 0)
        loss.backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([x[mask] for x in out[:3]] + [loss, f.grad[mask]] + [g for g in trained if g is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_no_mask_has_as_many_rows_as_the_sequence(lm_folder, monkeypatch, layout):
    model, original, seen = make(lm_folder, layout=layout), F.scaled_dot_product_attention, []

    def record(query, key, value, attn_mask=None, is_causal=False, **options):
        seen.append((tuple(query.shape), None if attn_mask is None else tuple(attn_mask.shape), is_causal))
        return original(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    f, mask = inputs((8, 5))
    model(f, mask, ["Jump: 1-4.", "No action."])
    A, P = seen[1][0][2], model.sequence_length(8)
    row = None if layout == "text-first" else (2, 1, 1, P)
    assert seen == [((2, 4, P, 8), row, layout == "text-first"), ((2, 4, A, 8), (2, 1, A, P + A), False)] * 2
    seen.clear()
    model(f, torch.ones_like(mask), padded=False)
    assert seen == [((2, 4, P, 8), None, layout == "text-first")] * 2


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_padded_frames_stay_finite(lm_folder, layout):
    for dtype in ("float32", "bfloat16"):
        out = make(lm_folder, layout=layout, dtype=dtype)(*inputs((8, 1)))
        assert all(x.isfinite().all() for x in out[:3])


def test_an_architecture_with_an_attention_of_its_own_is_an_error(lm_folder, tmp_path):
    shutil.copytree(lm_folder, tmp_path / "lm")
    BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "lm")
    with pytest.raises(InputError, match="--lm .*lm: .*found model_type bloom"):
        make(tmp_path / "lm")
    model = make(lm_folder)
    with pytest.raises(InputError, match="--lm: .*found model_type qwen2"):                # keywords not handed on
        model.lm.get_base_model().model(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.filterwarnings("error")                         # transformers has renamed what it is given the cache by
@pytest.mark.parametrize("lengths", [(8,), (8, 5), (5, 8, 1)])
def test_cached_prompt_gives_the_same_features(lm_folder, lengths):
    model, (f, mask) = make(lm_folder, layout="text-first"), inputs(lengths)
    plain = model(f, mask)
    with model.cached_prompt():
        for _ in range(2):
            cached = model(f, mask)
            assert {key.size(2) for pair in model.cached for key in pair} == {len(model.prompt_ids)}   # has not grown
        one = model(f[:1], mask[:1])
    for a, b, c in zip(plain[:3], cached[:3], one[:3]):
        torch.testing.assert_close(a[mask], b[mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a[:1][mask[:1]], c[mask[:1]], atol=1e-5, rtol=1e-5)


def test_cached_prompt_computes_frames_alone_and_no_gradients(lm_folder, monkeypatch):
    model, (f, mask) = make(lm_folder, layout="text-first"), inputs()
    read, original = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda tokens, *rest: read.append(tokens.size(1)) or original(tokens, *rest))
    with model.cached_prompt():
        assert not model(f, mask).f_adv.requires_grad
        model(f, mask)
        model.set_descriptions(dict(zip(CLASSES, reversed(CLASSES.values()))))             # drops it
        changed = model(f, mask)
        model.train()(f, mask)                                                             # reads it all
    T = len(model.prompt_ids)
    assert read == [T, 32, 32, T, 32, T + 32]
    torch.testing.assert_close(changed.f_adv, model.eval()(f, mask).f_adv, atol=1e-5, rtol=1e-5)


def test_cached_prompt_is_dropped_at_the_end_and_absent_from_frames_first(lm_folder):
    f, mask = inputs()
    for layout in ("text-first", "frames-first"):
        model = make(lm_folder, layout=layout)
        with model.cached_prompt():
            model(f, mask)
            assert bool(model.cached) == (layout == "text-first")
        assert model.cached is None
        model.special_tokens.data += 1.0
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.1
        plain = model(f, mask).f_adv
        with model.cached_prompt():
            torch.testing.assert_close(model(f, mask).f_adv, plain, atol=1e-5, rtol=1e-5)


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
    model.lm.get_base_model().set_attn_implementation("sdpa")
    logits = model.lm(inputs_embeds=tokens, attention_mask=seen).logits[0]
    model.lm.get_base_model().set_attn_implementation("prefix")
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


def test_nothing_is_cast_up_before_lora(lm_folder):
    """Float32 copies of LoRA's inputs would be a quarter of what a layer reads and writes beside its products."""
    half, (f, mask), seen = make(lm_folder, dtype="bfloat16"), inputs(), []
    for name, module in half.lm.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    half(f, mask)
    assert set(seen) == {torch.bfloat16} and len(seen) == 14                            # 7 in each of 2 layers


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
        hidden = model.hidden_states(tokens, valid, model.visibility(valid, answer.size(1)))
        logits = model.lm.get_base_model().lm_head(hidden[:, -13:-1])
    assert logits.argmax(-1).tolist() == ids
