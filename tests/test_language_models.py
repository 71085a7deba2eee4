"""Language models of transformers: folders that are read or refused, and masks that steer their attention."""
import json
import shutil

import pytest
import torch
import transformers
from conftest import CLASSES, language_inputs, language_model, make_random_lm
from safetensors.torch import load_file, save_file

from support.annotations import InputError
from support.language_models import (
    attention_masks,
    check_model,
    enable_checkpointing,
    load_language_model,
    logits,
    name_of_cache,
)
from vlm import instruction

SLIDING = ["sliding_attention", "full_attention"] * 2
ARCHITECTURES = {                                             # 4 layers; a window of 8 tokens in those that slide
    "qwen2": {},
    "qwen2 sliding": dict(use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": {},
    "llama": {},
    "mistral": dict(sliding_window=8),
    "phi3": dict(sliding_window=8),
    "gemma3_text": dict(sliding_window=8, layer_types=SLIDING),
    "gpt_neox": {},
    "gpt2": dict(n_embd=32, n_layer=4, n_head=4, n_positions=128),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
}


def tiny(name: str, attention="sdpa", **changes):
    """A random model; wide enough a start for attention to matter."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=None, initializer_range=0.2)
    if name.startswith("falcon"):                             # computes it
        del sizes["head_dim"]
    config = transformers.AutoConfig.for_model(name.split()[0], **sizes | ARCHITECTURES.get(name, {}) | changes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tokens_of(N: int) -> torch.Tensor:
    return torch.randn(1, N, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hidden_states(model, tokens, start=0, **options):
    """(1, n, D) of tokens (1, n, D), the first of which is number `start`."""
    position = start + torch.arange(tokens.size(1))[None]
    options = dict(use_cache=False) | options
    return model.base_model(inputs_embeds=tokens, position_ids=position, **options).last_hidden_state


def places(N: int) -> torch.Tensor:
    return torch.arange(N)[None]


def causal(N: int) -> torch.Tensor:
    return torch.ones(1, 1, N, N, dtype=torch.bool).tril()


# ------------------------------------------------------------------------------------------------ masks
@pytest.mark.parametrize("name, layers", [("qwen2 sliding", 2), ("mistral", 4), ("phi3", 4), ("gemma3_text", 2)])
def test_what_no_window_reaches_has_exactly_no_influence(name, layers):
    """Each sliding layer carries over 7 tokens, and layers that do not slide are made to carry nothing."""
    model, tokens = tiny(name), tokens_of(40)
    for layer, kind in zip(model.model.layers, getattr(model.config, "layer_types", None) or []):
        if kind == "full_attention":
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    masks = attention_masks(model.config, torch.ones(1, 1, 40, 40, dtype=torch.bool), places(40))
    plain = hidden_states(model, tokens, attention_mask=masks)[0, 0]
    for last, reaches in ((7 * layers, True), (7 * layers + 1, False), (39, False)):
        changed = tokens.clone()
        changed[0, last] *= -1
        assert torch.equal(hidden_states(model, changed, attention_mask=masks)[0, 0], plain) != reaches


@pytest.mark.parametrize("name", ["qwen2", "qwen2 sliding", "mistral", "gemma3_text"])
def test_the_last_queries_over_a_cache_see_what_they_see_in_the_whole_sequence(name):
    model, tokens = tiny(name), tokens_of(40)
    mask = causal(40)
    mask[..., :20, :20] = True                                                 # a prefix of 20 tokens
    whole = hidden_states(model, tokens, attention_mask=attention_masks(model.config, mask, places(40)))
    options = {name_of_cache(model.base_model): transformers.DynamicCache(), "use_cache": True}
    parts = [hidden_states(model, tokens[:, i:j], i, **options,
                           attention_mask=attention_masks(model.config, mask[:, :, i:j, :j], places(j))) for i, j in ((0, 20), (20, 33), (33, 34), (34, 40))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_attention_masks_by_hand():
    mask = torch.ones(1, 1, 2, 5, dtype=torch.bool)                            # tokens 3 and 4 of 5
    mask[..., 4] = False
    near = [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]                                  # at most one token away
    config = tiny("mistral", sliding_window=2).config
    assert attention_masks(config, mask, places(5))[0, 0].int().tolist() == near
    padded = torch.tensor([[0, 1, 1, 1, 2]])                                   # tokens 2 and 3 are padding
    seen = torch.tensor([True, True, False, False, True]).expand(1, 1, 2, 5)
    assert attention_masks(config, seen, padded)[0, 0].int().tolist()[1] == [0, 1, 0, 0, 1]
    config.sliding_window = None
    assert attention_masks(config, mask, places(5)) is mask
    masks = attention_masks(tiny("gemma3_text", sliding_window=2).config, mask, places(5))
    assert masks["full_attention"] is mask and masks["sliding_attention"][0, 0].int().tolist() == near
    assert len(masks) == 2
    for changes in ({}, dict(use_sliding_window=False, sliding_window=2, max_window_layers=2)):
        assert attention_masks(tiny("qwen2", **changes).config, mask, places(5)) is mask
    everywhere = tiny("qwen2", use_sliding_window=True, sliding_window=2, max_window_layers=0).config
    assert attention_masks(everywhere, mask, places(5))[0, 0].int().tolist() == near


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention"])
def test_layers_of_another_kind_are_an_error_that_names_it(kind):
    config = transformers.LlamaConfig()
    config.layer_types = ["full_attention", kind]
    with pytest.raises(InputError, match=f"expected layers of full or sliding attention, found {kind}"):
        attention_masks(config, causal(4), places(4))


# ------------------------------------------------------------------------------------------------ the check
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_that_obey_a_mask_are_taken(name, dtype):
    model = tiny(name, initializer_range=0.02).to(dtype)
    before = torch.get_rng_state()
    check_model(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name, attention, changes, message", [
    ("rwkv", None, {}, "it takes no position_ids"),
    ("gpt_neo", None, dict(num_heads=4, attention_types=[[["global"], 4]]), "a 4-D mask does not decide"),
    ("qwen2", "eager", {}, "a 4-D mask does not decide"),                    # adds True as 1
    ("llama4_text", None, dict(num_local_experts=2), "found chunked_attention"),
    ("qwen3_next", None, dict(num_experts=4, layer_types=["linear_attention", "full_attention"] * 2),
     "found linear_attention"),
])
def test_models_that_do_not_are_refused(name, attention, changes, message):
    with pytest.raises(Exception, match=message):
        check_model(tiny(name, attention, **changes))


# ------------------------------------------------------------------------------------------------ architectures
HYBRID, NO_EXCHANGE = "expected layers of full or sliding attention, found ", "scaled_dot_product_attention"
MLA = dict(num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
               moe_intermediate_size=32, shared_expert_intermediate_size=32, first_k_dense_replace=1)
OLD = dict(n_embd=32, n_layer=2, n_head=4, n_positions=2048)
SHORT = dict(sliding_window=16, layer_types=SLIDING[:2])
MORE = "its output layer does more than to multiply by a matrix and a number"
READ_OR_REFUSED = {                                    # {model_type: (what its config needs, part of the refusal)}
    "gpt2": (OLD, ""), "gpt_neox": ({}, ""), "gptj": (OLD | dict(rotary_dim=4), ""), "gpt_bigcode": (OLD, ""),
    "codegen": (OLD | dict(n_ctx=2048, rotary_dim=4), ""), "falcon": ({}, ""), "falcon alibi": (dict(alibi=True), "too many values"),
    "opt": (dict(ffn_dim=64, word_embed_proj_dim=32), ""), "bloom": ({}, NO_EXCHANGE), "mpt": (dict(d_model=32, n_heads=4, n_layers=2), NO_EXCHANGE),
    "phi": ({}, ""), "phi3": (dict(sliding_window=16), ""), "phimoe": (EXPERTS, ""), "persimmon": ({}, ""), "stablelm": ({}, ""),
    "gemma": ({}, ""), "gemma2": ({}, f"({NO_EXCHANGE}|caps its scores)"), "gemma3_text": (SHORT, ""), "glm": ({}, ""), "glm4": ({}, ""),
    "granite": (dict(logits_scaling=8.0, embedding_multiplier=6.0), ""), "cohere": ({}, ""), "cohere2": (SHORT, ""),
    "olmo": ({}, ""), "olmo2": ({}, ""), "olmo3": (SHORT, ""), "smollm3": ({}, ""), "llama": ({}, ""), "mistral": (dict(sliding_window=16), ""),
    "mixtral": (EXPERTS | dict(sliding_window=16), ""), "qwen2": (dict(use_sliding_window=True, sliding_window=16, max_window_layers=1), ""),
    "qwen2_moe": (EXPERTS, ""), "qwen3": ({}, ""), "qwen3_moe": (EXPERTS, ""), "deepseek_v2": (MLA | EXPERTS, ""), "deepseek_v3": (MLA | EXPERTS, ""),
    "starcoder2": (dict(sliding_window=16), ""), "biogpt": ({}, ""), "ernie4_5": ({}, ""), "exaone4": (SHORT, ""), "helium": ({}, ""),
    "nemotron": ({}, ""), "gpt_oss": (EXPERTS, NO_EXCHANGE), "xglm": (dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=64), NO_EXCHANGE),
    "mamba": ({}, NO_EXCHANGE), "rwkv": ({}, NO_EXCHANGE), "jamba": (EXPERTS, HYBRID),
    "qwen3_next": (EXPERTS | dict(layer_types=["linear_attention", "full_attention"]), HYBRID + "linear_attention"),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), HYBRID + "conv"), "minimax": (EXPERTS, HYBRID),
    "llama4_text": (EXPERTS | dict(intermediate_size_mlp=64), HYBRID + "chunked_attention"), "bert": (dict(is_decoder=True), MORE),
    "roberta": (dict(is_decoder=True, pad_token_id=1), MORE), "nanochat": (dict(final_logit_softcapping=0.5), MORE),
    "bart": (dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64), "it takes no position_ids"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", READ_OR_REFUSED)
def test_an_architecture_gives_the_hidden_states_of_its_own_forward_or_is_refused_in_one_line(lm_folder, tmp_path, name):
    """Windows of 16 tokens are shorter than the sequence. Neither padding nor a kept prompt changes a feature."""
    changes, refusal = READ_OR_REFUSED[name]
    shutil.copytree(lm_folder, tmp_path / "lm")
    rows = json.loads((tmp_path / "lm/config.json").read_text())["vocab_size"] + 3             # a padded table
    model = tiny(name, None, num_hidden_layers=2, vocab_size=rows, max_position_embeddings=2048, eos_token_id=0,
                 bos_token_id=None, **changes)
    model.save_pretrained(tmp_path / "lm")
    if not (refusal or model._supports_sdpa):                                                  # GPT-J before transformers 5.24
        refusal = NO_EXCHANGE
    if refusal:
        with pytest.raises(InputError, match=f"found model_type {name.split()[0]}: .*{refusal}") as caught:
            language_model(tmp_path / "lm")
        assert "\n" not in str(caught.value) and "https" not in str(caught.value)
        return
    model, (f, mask) = language_model(tmp_path / "lm", layout="text-first"), language_inputs((5, 8))
    tokens, _ = model.sequence(f[1:], mask[1:], *[torch.zeros(1, 0, dtype=torch.long)] * 2)
    own = model.lm.get_base_model().base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, -32:]
    plain = model(f, mask)
    torch.testing.assert_close(torch.stack(plain[:3], 2)[1].flatten(0, 1), own.view(8, 4, -1)[:, 1:].flatten(0, 1), atol=2e-5, rtol=1e-4)
    model.keep_prompt()
    torch.testing.assert_close(model(f, mask).f_adv[mask], plain.f_adv[mask], atol=2e-5, rtol=1e-4)
    model.eval()
    model.layout = "frames-first"
    torch.testing.assert_close(model(f, mask).f_adv[:1, :5], model(f[:1, :5], mask[:1, :5]).f_adv, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["granite", "cohere", "gpt2"])
def test_scores_of_the_next_token_are_those_of_the_model_itself(name):
    model, tokens = tiny(name, **READ_OR_REFUSED[name][0]), tokens_of(6)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, hidden_states(model, tokens)), model(inputs_embeds=tokens).logits)


def test_frames_have_the_scale_of_embeddings_that_the_model_scales(lm_folder, tmp_path):
    shutil.copytree(lm_folder, tmp_path / "lm")
    rows = json.loads((tmp_path / "lm/config.json").read_text())["vocab_size"]
    tiny("gemma3_text", vocab_size=rows).save_pretrained(tmp_path / "lm")
    model = language_model(tmp_path / "lm")
    assert model.embedding_scale == pytest.approx(32 ** 0.5 * model.lm.get_input_embeddings().weight.std().item(), rel=1e-3)


def test_a_model_whose_activations_cannot_be_computed_again_is_an_error_that_names_the_flag():
    model = tiny("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="found LlamaForCausalLM; say --grad-checkpoint off"):
        enable_checkpointing(model)


# ------------------------------------------------------------------------------------------------ the tiny one
def test_the_random_tokenizer_gives_back_what_it_read(lm_folder):
    tokenizer = load_language_model(lm_folder, torch.float32)[1]
    for text in (instruction(CLASSES), "Jump: 12-48, Run: 60-75.", "unseen words, 3.14: \u00e9\u4e2d\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_random_language_model_is_the_same_when_made_again(tmp_path):
    before = torch.get_rng_state()
    for name in "ab":
        make_random_lm(tmp_path / name, [instruction(CLASSES)], dim=16)
    assert torch.equal(torch.get_rng_state(), before)
    for file in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# ------------------------------------------------------------------------------------------------ folders
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
    plain, _ = load_language_model(lm_folder, torch.float32)
    taken, _ = load_language_model(as_internvl(lm_folder, tmp_path / layout, layout), torch.float32)
    assert plain.state_dict().keys() == taken.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, taken.state_dict()[name])
    torch.testing.assert_close(hidden_states(plain, tokens_of(6)), hidden_states(taken, tokens_of(6)))


def test_attention_is_that_of_torch_and_dtype_as_asked(lm_folder):
    model, _ = load_language_model(lm_folder, torch.bfloat16)
    assert model.config._attn_implementation == "sdpa" and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_tied_embeddings_give_the_output_layer(lm_folder):
    model, _ = load_language_model(lm_folder, torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_tokenizer_of_another_model_is_an_error(lm_folder, tmp_path):
    """A larger one, and one whose end token was added without an embedding; more embeddings than tokens are common."""
    shutil.copytree(lm_folder, tmp_path / "lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm_folder)
    size = len(tokenizer)
    tiny("llama", vocab_size=size - 5).save_pretrained(tmp_path / "lm")
    with pytest.raises(InputError, match=f"llama: a tokenizer of another model: it has ids beyond {size - 5} embeddings"):
        load_language_model(tmp_path / "lm", torch.float32)
    tiny("llama", vocab_size=size).save_pretrained(tmp_path / "lm")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})                       # has no embedding, and is never read
    tokenizer.save_pretrained(tmp_path / "lm")
    load_language_model(tmp_path / "lm", torch.float32)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(InputError, match=f"ids beyond {size} embeddings"):
        load_language_model(tmp_path / "lm", torch.float32)


def test_a_missing_or_misshapen_weight_is_an_error_that_names_it(lm_folder, tmp_path):
    shutil.copytree(lm_folder, tmp_path / "lm")
    path = tmp_path / "lm/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, path, {"format": "pt"})
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_language_model(tmp_path / "lm", torch.float32)
    save_file(tensors | {name: tensors[name][:, :3].contiguous()}, path, {"format": "pt"})
    with pytest.raises(InputError, match="lm: expected"):
        load_language_model(tmp_path / "lm", torch.float32)


@pytest.mark.parametrize("content, message", [
    (None, "no such folder"), ("{", "config.json"), ('{"model_type": "of_the_future"}', "of_the_future"),
    ('{"model_type": "qwen2", "hidden_size": 8}', "expected weights and tokenizer")])
def test_what_is_no_language_model_is_an_error_that_names_the_folder(tmp_path, content, message):
    folder = tmp_path / "lm"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_language_model(folder, torch.float32)
    assert str(folder) in str(caught.value)
