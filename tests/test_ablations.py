"""Rows of Tables 2, 4 and 9: each changes one thing of model or training, and a checkpoint keeps the change."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, feature_batch

import evaluate
import train
from experiments.ablations import ABLATIONS, ablate
from model import aggregate, language_weight
from support import checkpoint, flags
from vlm import instruction

# --ablation or --lambda-lang -> all that it changes
ROWS = {
    ("ablation", "only-language"): {"aggregate", "weight", "lambda_adv"},
    ("ablation", "labels-only"): {"descriptions", "prompt"},
    ("ablation", "shuffled-descriptions"): {"prompt"},
    ("ablation", "vision-tokens"): {"read_out"},
    ("ablation", "shared-token"): {"read_out"},
    ("ablation", "without-tg"): {"lambda_tg"},
    ("ablation", "without-adv"): {"lambda_adv"},
    ("lambda_lang", 0.4): {"weight", "lambda_adv"},
    ("lambda_lang", 1.0): {"weight", "lambda_adv"},
    ("lambda_lang", "generated"): {"advantage", "weight", "lambda_adv", "predict_advantage", "standardise_adv"},
}
NAMES = [str(value) for _, value in ROWS]
every_row = pytest.mark.parametrize("row", ROWS, ids=NAMES)


def arguments(flag=None, value=None):
    args = SimpleNamespace(ablation=None, lambda_lang="learned", lambda_tg=0.1, lambda_adv=0.2, lambda_loc=1.0)
    if flag:
        setattr(args, flag, value)
    return args


@pytest.fixture
def make_ablated(make_model):
    """Factory (flag, value) -> model, flags. Language takes part: the predictor expects an advantage."""
    def make(flag=None, value=None, **config):
        model, args = make_model(**config), arguments(flag, value)
        torch.manual_seed(1)
        torch.nn.init.normal_(model.predict_advantage.fc.weight, std=0.5)
        torch.nn.init.constant_(model.predict_advantage.fc.bias, 0.5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        for name, buffer in model.named_buffers():                      # else standardising changes nothing
            if name.startswith("standardise_") and not name.endswith("steps"):
                torch.nn.init.uniform_(buffer, 0.5, 2)
        if flag:
            ablate(model, args)
        return model, args
    return make


def parts(model, args) -> dict:
    """All that a row may change, as values that can be compared."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(2, 5, 32, generator=generator) for _ in range(4))
    values, config = torch.randn(2, 5, generator=generator), dict(vars(model.config))
    return {
        "aggregate": model.aggregate(a, b, values.abs()), "weight": model.language_weight(values),
        "advantage": model.predict_advantage(d), "prompt": model.language.prompt_ids,
        "read_out": torch.stack(model.language.read_out(a, b, c, d)), "descriptions": config.pop("descriptions"),
        "config": config, "predict_advantage": [n for n, _ in model.predict_advantage.named_parameters()],
        "standardise_adv": model.standardise_adv(d, torch.ones(2, 5, dtype=torch.bool)), "lambda_tg": args.lambda_tg, "lambda_adv": args.lambda_adv, "lambda_loc": args.lambda_loc,
        "rest": {n: t for n, t in model.state_dict().items() if not n.startswith(("predict_advantage.", "standardise_adv."))},
        "trained": [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("predict_advantage.")],
    }


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[n], b[n]) for n in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_every_choice_of_the_flags_is_a_row():
    assert {value for flag, value in ROWS if flag == "ablation"} == set(flags.ABLATIONS) == set(ABLATIONS)


@every_row
def test_a_row_changes_what_it_says_and_nothing_else(make_ablated, row):
    plain, ablated = parts(*make_ablated()), parts(*make_ablated(*row))
    assert plain.keys() == ablated.keys()
    assert {name for name in plain if not equal(plain[name], ablated[name])} == ROWS[row]


# ------------------------------------------------------------------------------------------- Table 2
def test_table2_only_language_f_lang_alone_reaches_the_head(make_ablated):
    model, batch = make_ablated("ablation", "only-language")[0].eval(), feature_batch([8, 6], L=8)
    output, lang = model(batch), model.language(model.visual(batch), batch.mask)
    f_cls, f_loc = model.standardise_cls(lang.f_lang_cls, batch.mask), model.standardise_loc(lang.f_lang_loc, batch.mask)
    alone = model.head(f_cls, f_loc, batch.mask)
    torch.testing.assert_close(output.lambda_lang, batch.mask.float())
    for a, b in zip(output.cls_logits + output.offsets, alone.cls_logits + alone.offsets):
        torch.testing.assert_close(a, b)


def test_table2_only_language_f_vis_gets_to_the_head_through_the_language_model_alone(make_ablated, monkeypatch):
    model, batch = make_ablated("ablation", "only-language")[0].eval(), feature_batch([8, 8])
    other = feature_batch([8, 8], seed=1)
    before, after = model(batch), model(other)
    assert (before.cls_logits[0] - after.cls_logits[0]).abs().max() > 1e-3
    before.cls_logits[0].sum().backward()
    assert model.project.weight.grad.abs().sum() > 0 and model.language.special_tokens.grad.abs().sum() > 0
    fixed = model.language(model.visual(batch), batch.mask)
    fixed = type(fixed)(*(f.detach() for f in fixed[:3]), None)
    monkeypatch.setattr(model.language, "forward", lambda *args: fixed)
    one, two = model(batch), model(other)
    for a, b in zip(one.cls_logits + one.offsets, two.cls_logits + two.offsets):
        assert torch.equal(a, b)                                       # no way around the language model
    model.zero_grad()
    one.cls_logits[0].sum().backward()
    assert model.project.weight.grad is None or not model.project.weight.grad.any()


# ------------------------------------------------------------------------------------------- Table 4
@pytest.mark.parametrize("weight", [0.2, 0.4, 1.0])
def test_table4_fixed_weight_is_the_number_on_real_frames(make_ablated, weight):
    model, batch = make_ablated("lambda_lang", weight)[0].eval(), feature_batch([6, 8], L=8)
    output, f_vis = model(batch), model.visual(batch)
    torch.testing.assert_close(output.lambda_lang, weight * batch.mask)
    lang = model.language(f_vis, batch.mask)
    f_cls, f_loc = model.standardise_cls(lang.f_lang_cls, batch.mask), model.standardise_loc(lang.f_lang_loc, batch.mask)
    by_hand = model.head(f_vis + weight * f_cls, f_vis + weight * f_loc, batch.mask)
    for a, b in zip(output.cls_logits + output.offsets, by_hand.cls_logits + by_hand.offsets):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_table4_generated_weight_is_the_probability_of_yes_against_no(make_ablated):
    model, batch = make_ablated("lambda_lang", "generated")[0].eval(), feature_batch([6], L=8)
    output = model(batch)
    f_adv = model.language(model.visual(batch), batch.mask).f_adv
    yes, no = (model.language.tokenizer(word).input_ids[-1] for word in (" yes", " no"))
    rows = model.language.lm.get_output_embeddings().weight
    expected = torch.sigmoid(f_adv @ (rows[yes] - rows[no])) * batch.mask
    logits = model.language.logits(f_adv)
    assert yes != no
    torch.testing.assert_close(output.lambda_lang, expected)
    torch.testing.assert_close(expected, logits[..., [yes, no]].softmax(-1)[..., 0] * batch.mask, atol=1e-5, rtol=1e-5)
    output.cls_logits[0].sum().backward()                           # trains the language model through the weight
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_table4_generated_weight_in_bfloat16_is_float32(make_ablated):
    output = make_ablated("lambda_lang", "generated", dtype="bfloat16")[0].eval()(feature_batch([6], L=8))
    assert output.lambda_lang.dtype == torch.float32 and (output.lambda_lang[:, :6] > 0).all()


def test_table4_without_language_the_model_has_no_language_model(lm_folder, features):
    args = train.get_args([*features, "--lm", lm_folder, "--lambda-lang", "0"])
    config = train.build_config(args, SimpleNamespace(feature_dim=6), CLASSES)
    model = train.build_model(args, config)
    assert config.lm == "" and model.language is None
    assert model.aggregate is aggregate and model.language_weight is language_weight


# ------------------------------------------------------------------------------------------- Table 9
def test_table9_labels_only_prompt_has_the_names_and_no_sentence(make_ablated):
    model, _ = make_ablated("ablation", "labels-only")
    prompt = model.language.tokenizer.decode(model.language.prompt_ids)
    assert prompt == instruction(dict.fromkeys(CLASSES, "")) and prompt.endswith("include:\nJump\nRun\nThrow")
    assert not any(sentence in prompt for sentence in CLASSES.values())
    assert model.config.classes == list(CLASSES)


@pytest.mark.parametrize("name, columns", [(None, (1, 2, 3)), ("shared-token", (1, 1, 1)), ("vision-tokens", (0, 0, 0))])
@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_table9_tokens_whose_hidden_states_are_the_features(make_ablated, monkeypatch, layout, name, columns):
    model, batch = make_ablated(name and "ablation", name, layout=layout)[0].eval(), feature_batch([8])
    seen, original = [], model.language.hidden_states
    monkeypatch.setattr(model.language, "hidden_states", lambda *args: seen.append(original(*args)) or seen[0])
    features = model.language(model.visual(batch), batch.mask)
    frames = seen[0][:, :32] if layout == "frames-first" else seen[0][:, -32:]
    for feature, column in zip(features, columns):
        torch.testing.assert_close(feature, frames[:, column::4])


# ------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Random features of width 6 with annotations and descriptions -> flags of train.py."""
    folder, rng, database = tmp_path_factory.mktemp("features"), np.random.default_rng(0), {}
    for name, subset in (("a", "training"), ("b", "training"), ("c", "validation")):
        np.save(folder / f"{name}.npy", rng.normal(size=(40, 6)).astype(np.float32))
        database[name] = {"subset": subset, "duration": 5.4, "fps": 30, "annotations": [
            {"label": "Run", "segment": [1, 3]}, {"label": "Jump", "segment": [3.5, 4.5]}]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    (folder / "descriptions.json").write_text(json.dumps({"Jump": CLASSES["Jump"], "Run": CLASSES["Run"]}))
    return ["--dataset", "custom", "--features", str(folder), "--annotations", str(folder / "annotations.json"),
            "--descriptions", str(folder / "descriptions.json"), "--window", "16", "--levels", "3", "--width", "16",
            "--epochs", "2", "--warmup-epochs", "0", "--lr", "1e-2", "--lr-lm", "1e-2", "--ema", "0.5", "--lora-rank", "4",
            "--lora-alpha", "8", "--head-window", "0", "--device", "cpu"]


def options(flag, value):
    return [f"--{flag.replace('_', '-')}", str(value)]


def opened(folder):
    return evaluate.open_checkpoint(SimpleNamespace(checkpoint=str(folder), lm=None, out=None, device="cpu"))[:2]


def outputs(model) -> list:
    batch = feature_batch([16, 10], L=16, V=6)
    with torch.no_grad():
        output = model.eval()(batch)
    return output.cls_logits + output.offsets + [output.advantage, output.lambda_lang]


@pytest.mark.parametrize("row", [*ROWS, ("lambda_lang", 0.0), ("ablation", None)], ids=[*NAMES, "0.0", "plain"])
def test_a_checkpoint_opens_as_the_model_that_was_trained(features, lm_folder, tmp_path, monkeypatch, capsys, row):
    trained, detect = [], train.detect
    monkeypatch.setattr(train, "detect", lambda model, *rest: trained.append(model) or detect(model, *rest))
    more = [] if row[1] is None else options(*row)
    assert train.main([*features, "--lm", lm_folder, "--out", str(tmp_path), *more]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    model, args = opened(tmp_path)
    without = row in [("ablation", None), ("lambda_lang", 0.0)]
    changed = set() if without else ROWS[row]
    assert (args.lambda_tg, args.lambda_adv) == (0.0 if "lambda_tg" in changed else 0.1,
                                                 0.0 if "lambda_adv" in changed else 0.1)
    expected = outputs(trained[0])
    for a, b in zip(expected, outputs(model), strict=True):
        assert (a is b is None) or torch.equal(a, b)
    if not without:
        saved = checkpoint.read_checkpoint(tmp_path / "checkpoint.safetensors")
        plain = train.ActionVLM(train.Config(**saved.config))
        plain.load_state_dict(model.state_dict(), strict=False)
        alike = all(torch.equal(a, b) for a, b in zip(expected, outputs(plain)))
        assert alike == (row[1] in ("without-tg", "without-adv", "labels-only"))     # these change no forward pass
    assert evaluate.main(["--checkpoint", str(tmp_path), "--device", "cpu"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table
    log = checkpoint.read_log(tmp_path / "log.jsonl")
    for epoch in log:
        terms = {"loss_tg": args.lambda_tg, "loss_adv": args.lambda_adv}
        expected = epoch["loss_cls"] + epoch["loss_loc"] + sum(w * epoch.get(name, 0) for name, w in terms.items())
        assert epoch["loss"] == pytest.approx(expected, rel=1e-4)                     # Eq. 9
    assert ("lambda_lang" in log[1]) == (row != ("lambda_lang", 0.0))


@pytest.mark.parametrize("more, message", [(["--ablation", "shared-token"], "another in ablation"), ([], "another in ablation"),
                                           (["--lambda-lang", "0.4"], "another in ablation, lambda_lang")])
def test_a_run_does_not_go_on_as_another_row(features, lm_folder, tmp_path, capsys, more, message):
    flags = [*features, "--lm", lm_folder, "--out", str(tmp_path), "--epochs", "1"]
    assert train.main([*flags, "--ablation", "without-tg"]) == 0
    assert train.main([*flags, "--resume", *more]) == 2
    assert message in capsys.readouterr().err
    assert train.main([*flags, "--resume", "--ablation", "without-tg"]) == 0
