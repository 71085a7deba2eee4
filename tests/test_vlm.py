"""Language feature generation (§3.2, Eq. 7-8, Appendix B): prompt, answer, attention, LoRA."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES
from conftest import language_inputs as inputs
from conftest import language_model as make
from transformers import LlamaConfig, LlamaForCausalLM

import vlm
from support.annotations import InputError
from support.summary import describe_step
from vlm import instruction, prefix_lm_mask, proposal_text

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
    monkeypatch.setattr(model, "prefix", lambda L: 0)
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


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
@pytest.mark.parametrize("stride", [2, 3])
def test_language_stride_reads_means_and_gives_every_frame_a_feature(lm_folder, layout, stride):
    """The same as means by hand, read one by one, then interpolated: 7 frames, the last group is not full."""
    f, mask = inputs((7,), L=7)
    slow, plain = make(lm_folder, layout=layout, stride=stride), make(lm_folder, layout=layout)
    groups = [f[0, i:i + stride].mean(0) for i in range(0, 7, stride)]
    few = plain(torch.stack(groups)[None], torch.ones(1, len(groups), dtype=torch.bool))
    for ours, low in zip(slow(f, mask)[:3], few[:3]):
        place = ((np.arange(7) + 0.5) / stride - 0.5).clip(0, len(groups) - 1)
        expected = [np.interp(place, np.arange(len(groups)), channel) for channel in low[0].T.detach().numpy()]
        np.testing.assert_allclose(ours[0].detach(), np.array(expected).T, atol=1e-5)
    assert slow.sequence_length(7) == 4 * len(groups) + len(slow.prompt_ids)


def test_language_stride_single_equals_batched_and_padding_counts_nowhere(lm_folder):
    model = make(lm_folder, stride=4)
    f, mask = inputs((5, 12), L=12)
    f[0, 5:] = 1e3
    both, alone = model(f, mask), model(f[:1, :5], mask[:1, :5])
    for a, b in zip(both[:3], alone[:3]):
        torch.testing.assert_close(a[:1, :5], b[:, :5], atol=1e-5, rtol=1e-5)
    empty = model(f[:1], torch.zeros(1, 12, dtype=torch.bool))
    assert all(torch.isfinite(one).all() for one in empty[:3])


def test_language_stride_reads_the_answer_and_writes_one(lm_folder):
    f, mask = inputs((8,))
    model = make(lm_folder, stride=4)
    assert model(f, mask, ["Jump: 1-5."]).text_loss > 0
    for one, two in zip(model(f, mask)[:3], model(f, mask, ["Jump: 1-5."])[:3]):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_the_dry_run_counts_the_tokens_of_the_stride(lm_folder, capsys):
    model = SimpleNamespace(language=make(lm_folder, stride=4))
    describe_step(model, SimpleNamespace(resize_to=0, window=10, device="cpu"), {})
    prompt = len(model.language.prompt_ids)
    assert f"tokens of a window: 12 for 10 frames + {prompt} for the prompt = {12 + prompt}" in capsys.readouterr().out


def llama_folder(lm_folder, folder):
    """A tiny Llama with the tokenizer of the tiny Qwen2."""
    shutil.copytree(lm_folder, folder)
    sizes = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{k: sizes[k] for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "eos_token_id",
        "num_key_value_heads", "max_position_embeddings")}, initializer_range=0.2)).save_pretrained(folder)
    return folder


def mask_by_definition(valid, prefix):
    """(B, 1, N, N) bool, one token at a time."""
    B, N = valid.shape
    allowed = torch.zeros(B, 1, N, N, dtype=torch.bool)
    for i in range(N):
        for j in range(N):
            seen = j <= i or max(i, j) < prefix
            allowed[:, 0, i, j] = (valid[:, j] & seen) | (i == j)
    return allowed


def hidden_states_by_definition(model, layout, L):
    """In place of `hidden_states`: transformers' plain attention, to whose scores a mask of numbers is added."""
    def hidden_states(tokens, valid, prefix, cache=None):
        base = model.lm.get_base_model()
        base.set_attn_implementation("eager")
        mask = mask_by_definition(valid, 4 * L + len(model.prompt_ids) if layout == "frames-first" else 0)
        position = (valid.cumsum(1) - 1).clamp(min=0)
        hidden = base.model(inputs_embeds=tokens, position_ids=position, use_cache=False,
                            attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e9)).last_hidden_state
        base.set_attn_implementation("sdpa")
        return hidden
    return hidden_states


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("lengths, answers", [((8, 8), None), ((8, 5), None), ((8, 8), ["Jump: 1-4.", "No action."]),
                                              ((8, 5), ["Jump: 1-4, Run: 2-3.", "No action."])])
@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_who_sees_whom_is_as_defined(lm_folder, tmp_path, monkeypatch, layout, lengths, answers, architecture):
    """Features, loss and gradients; with activation checkpointing, which calls the layers again."""
    folder = lm_folder if architecture == "qwen2" else llama_folder(lm_folder, tmp_path / "llama")
    results = []
    for defined in (True, False):
        model, (f, mask) = make(folder, layout=layout).train(), inputs(lengths)
        if defined:
            monkeypatch.setattr(model, "hidden_states", hidden_states_by_definition(model, layout, 8))
        else:
            model.checkpointing()
        out = model(f.requires_grad_(), mask, answers)
        loss = (torch.cat(out[:3], -1)[mask] ** 2).mean() + (out.text_loss if answers else 0)
        loss.backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([x[mask] for x in out[:3]] + [loss, f.grad[mask]] + [g for g in trained if g is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_padded_frames_stay_finite(lm_folder, layout):
    for dtype in ("float32", "bfloat16"):
        out = make(lm_folder, layout=layout, dtype=dtype)(*inputs((8, 1)))
        assert all(x.isfinite().all() for x in out[:3])


@pytest.mark.filterwarnings("error")                         # transformers has renamed what it is given the cache by
@pytest.mark.parametrize("lengths", [(8,), (8, 5), (5, 8, 1)])
def test_kept_prompt_gives_the_same_features(lm_folder, lengths):
    model, (f, mask) = make(lm_folder, layout="text-first"), inputs(lengths)
    plain = model(f, mask)
    model.keep_prompt()
    for _ in range(2):
        kept = model(f, mask)
        assert {layer.keys.size(2) for layer in model.kept_prompt.layers} == {len(model.prompt_ids)}   # has not grown
    one = model(f[:1], mask[:1])
    for a, b, c in zip(plain[:3], kept[:3], one[:3]):
        torch.testing.assert_close(a[mask], b[mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a[:1][mask[:1]], c[mask[:1]], atol=1e-5, rtol=1e-5)


def test_kept_prompt_is_read_once_without_gradients_and_forgotten_in_time(lm_folder, monkeypatch):
    model, (f, mask) = make(lm_folder, layout="text-first"), inputs()
    read, original = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda tokens, *rest: read.append(tokens.size(1)) or original(tokens, *rest))
    T, other = len(model.prompt_ids), dict(zip(CLASSES, reversed(CLASSES.values())))
    model.keep_prompt()
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in model.kept_prompt.layers)
    model(f, mask)
    model(f, mask)
    assert read == [T, 32, 32]
    model.set_descriptions(other)                                       # read anew from here on
    plain, T = model(f, mask), len(model.prompt_ids)
    model.keep_prompt()
    torch.testing.assert_close(model(f, mask).f_adv, plain.f_adv, atol=1e-5, rtol=1e-5)
    assert read[3:] == [T + 32, T, 32]
    for forget in (model.train, model.eval):
        model.keep_prompt()
        forget()
        model(f, mask)
    assert read[6:] == [T, T + 32] * 2
    assert model(f, mask).f_adv.requires_grad                           # nothing is left of `no_grad`


def test_kept_prompt_follows_the_weights_and_is_absent_from_frames_first(lm_folder):
    f, mask = inputs()
    for layout in ("text-first", "frames-first"):
        model = make(lm_folder, layout=layout)
        model.keep_prompt()
        before = model(f, mask).f_adv
        assert (model.kept_prompt is not None) == (layout == "text-first")
        assert model.eval().kept_prompt is None
        model.special_tokens.data += 1.0
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.1
        plain = model(f, mask).f_adv
        assert (plain - before).abs().max() > 1e-2
        model.keep_prompt()
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
    table, special = model.lm.get_input_embeddings().weight, model.special_tokens
    answer_ids = torch.cat([tokenize(answer), torch.tensor([model.tokenizer.eos_token_id])])
    frames = torch.stack([row for v in f[0] for row in (v * table.std(), *special)])              # v_l [cls] [loc] [adv]
    prompt = table[tokenize(instruction(CLASSES))]
    first = [frames, prompt] if layout == "frames-first" else [prompt, frames]
    tokens = torch.cat([*first, table[torch.cat([tokenize(vlm.ANSWER), answer_ids])]])[None]
    N, prefix = tokens.size(1), len(frames) + len(prompt)
    seen = mask_by_definition(torch.ones(1, N, dtype=torch.bool), prefix if layout == "frames-first" else 0)
    logits = model.lm(inputs_embeds=tokens, attention_mask=seen).logits[0]
    expected = F.cross_entropy(logits[N - len(answer_ids) - 1:N - 1], answer_ids)
    torch.testing.assert_close(model(f, mask, [answer]).text_loss, expected, atol=1e-5, rtol=1e-5)


def test_eq8_every_token_of_the_answer_is_a_label_once_and_nothing_else(lm_folder):
    model, answers = make(lm_folder), ["Jump: 1-5, Run: 0-7.", vlm.NO_ACTION]
    ids, valid, labels = model.answer_tokens(answers, torch.ones(2, 8, dtype=torch.bool))
    assert ids.shape == valid.shape == labels.shape and not valid[1].all()
    for b, answer in enumerate(answers):
        lead, text = (model.tokenizer(part).input_ids for part in (vlm.ANSWER, answer))
        text.append(model.tokenizer.eos_token_id)
        assert ids[b][valid[b]].tolist() == lead + text
        assert labels[b][labels[b] != -100].tolist() == text
        here = (labels[b] != -100).nonzero().flatten()
        assert torch.equal(ids[b][here + 1], labels[b][here])                # the label is the token that follows
    assert all(part.shape == (2, 0) for part in model.answer_tokens(None, torch.ones(2, 8, dtype=torch.bool)))


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
    with pytest.raises(InputError, match="shorten the sentences"):
        model.check_length(room // 4 + 1)
