"""Language feature generation (§3.2, Eq. 7-8, Appendix B): prompt, answer, attention, LoRA."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES
from transformers import LlamaConfig, LlamaForCausalLM

import vlm
from annotations import InputError
from vlm import LanguageModel, instruction, prefix_lm_mask, proposal_text


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
