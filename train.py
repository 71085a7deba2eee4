"""train.py - Algorithm 1 (paper §3.3, §3.6): vision-only and vision-language epochs in turn.

    python train.py                                 # the demo: renders videos, trains, evaluates; minutes on a CPU
    python train.py --dataset custom --features DIR --annotations FILE --descriptions FILE
    python train.py --dataset custom --videos DIR --annotations FILE --descriptions FILE
    python train.py ... --dry-run                   # load everything, say what was found, run one batch, write nothing
    python train.py ... --resume                    # go on from the checkpoint in --out, also in the middle of an epoch
    torchrun --nproc_per_node 4 train.py ...        # on several GPUs; --batch-size is of each

Writes into --out: checkpoint.safetensors, log.jsonl, result.json (ActivityNet format), report.png.
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler
from tqdm import tqdm

import figures
from advantage import advantage_loss, frame_classes, language_advantage
from annotations import (VIDEO_SUFFIXES, InputError, class_names, find_files, load_annotations, load_descriptions,
                         subset_of)
from checkpoint import (Stopped, StopSignals, append_row, load_checkpoint, model_state, read_log, save_checkpoint,
                        trained_parameters, trim_log, use_average, written_whole)
from data import (FEATURE_PRESETS, PRESETS, TALDataset, batch_loader, collate, dead_workers_named, doubt_steps,
                  make_demo, mean_over_all, open_features, probe, process_rank)
from evaluate import check_ranges, device, score_test_set
from head import detection_loss
from model import TINY_VISION, ActionVLM, Config
from vlm import instruction, language_config, make_tiny_lm, proposal_text
from weights import vision_config

FILES = ("checkpoint.safetensors", "log.jsonl", "result.json", "report.png")     # what a run writes into --out


def vision_only_epoch(run, loader) -> dict:
    """Algorithm 1, lines 1-8: train without language, and record the mean loss of each class."""
    run.model.train()
    if not run.batches_done:                                                      # an epoch that is resumed keeps them
        run.model.class_mean.reset()                                              # line 2
    for batch in run.batches(loader, "vision-only"):
        output = run.model(batch, use_language=False)
        dh = run.detection_loss(output, batch)                                    # line 4
        run.model.class_mean.update(dh.frame_loss, run.frame_classes(batch), batch.mask)   # line 5
        run.step(dh.loss_dh, loss_cls=dh.loss_cls, loss_loc=dh.loss_loc)          # line 6
    return run.end_epoch()


def vision_language_epoch(run, loader) -> dict:
    """Algorithm 1, lines 9-18: train with language, weighed by the advantage that [adv] predicts."""
    run.model.train()
    args, class_mean = run.args, run.model.class_mean.mean()
    for batch in run.batches(loader, "vision-language"):
        output = run.model(batch)                                                 # lines 11, 12: Eq. 2, 4, 5, 7
        dh = run.detection_loss(output, batch)                                    # line 13: Eq. 6
        advantage = language_advantage(class_mean, dh.frame_loss, run.frame_classes(batch))        # line 14: Eq. 1
        loss_adv = advantage_loss(output.advantage, advantage, batch.mask)        # line 15: Eq. 3
        predicted = args.lambda_lang == "learned" and args.features_used == "both"
        lambda_adv = args.lambda_adv if predicted else 0.0                        # another weight has no use for it
        loss = dh.loss_dh + args.lambda_tg * output.text_loss + lambda_adv * loss_adv  # line 16: Eq. 9
        sums = torch.stack([output.lambda_lang.sum(), (advantage * batch.mask).sum()])
        lambda_lang, advantage = mean_over_all(sums, batch.mask.sum())            # for the log
        run.step(loss, loss_cls=dh.loss_cls, loss_loc=dh.loss_loc, loss_tg=output.text_loss, loss_adv=loss_adv,
                 lambda_lang=lambda_lang, advantage=advantage)
    return run.end_epoch()


class Run:
    """One training run: model, optimizer, weight average, position, log. Its state is what a checkpoint holds.

    A step whose loss or gradient is not finite leaves no trace in that state but its place in the epoch. It is left out
    on the device, and `look` sees it later: no step waits for a GPU.
    """

    def __init__(self, model: ActionVLM, args, steps_per_epoch: int, signals: StopSignals | None = None):
        self.model, self.args, self.steps_per_epoch = model, args, steps_per_epoch
        self.device, self.signals = torch.device(args.device), signals or StopSignals()
        self.optimizer = torch.optim.AdamW(parameter_groups(model, args), betas=(0.9, 0.999), fused=True)
        self.ema = {n: p.detach().clone() for n, p in trained_parameters(model)} if args.ema else {}
        self.epoch, self.batches_done, self.global_step = 0, 0, 0                # batches_done: of this epoch
        self.terms, self.term_names = [], []             # this epoch's log row: for each batch the values of its terms
        self.videos, self.before = [], []                # names in the batch; running means before the step
        self.pending, self.unseen = [], []               # (terms, videos) of batches before a step; steps to look at
        self.out = None                                  # folder of the checkpoint; none is written without

    def batches(self, loader, kind: str):
        """Batches on the device, from the position in the epoch on, behind a progress bar with the time left."""
        self.started = time.time()
        loader.dataset.epoch, loader.batch_sampler.first = self.epoch, self.batches_done
        loader.generator.manual_seed(self.args.seed * 100003 + self.epoch)       # the order depends on the epoch alone
        if dist.is_initialized():
            loader.batch_sampler.sampler.set_epoch(self.epoch)
        bar = tqdm(loader, desc=f"epoch {self.epoch + 1}/{self.args.epochs} {kind}", leave=False, dynamic_ncols=True,
                   total=len(loader), initial=self.batches_done, disable=None if first_process() else True)
        for batch in bar:
            if not self.pending:
                self.before = [mean.clone() for mean in self.running_means()]
            self.videos = [window.video.name for window in batch.windows]
            yield batch.to(self.device)

    def frame_classes(self, batch):
        return frame_classes(batch.segments, batch.labels, batch.mask.size(1), len(self.model.config.classes))

    def detection_loss(self, output, batch):
        labels = [torch.zeros_like(l) for l in batch.labels] if self.model.config.class_agnostic else batch.labels
        return detection_loss(output, batch.segments, labels, self.model.head.loss_normalizer, self.args.lambda_loc,
                              self.args.label_smoothing)

    def running_means(self) -> list:
        """The buffers that a training step changes."""
        return [*self.model.class_mean.buffers(), self.model.head.loss_normalizer]

    def step(self, loss: torch.Tensor, **terms) -> None:
        """Adds up gradients; after --accumulate calls (or at the end of the epoch) one optimizer step."""
        (loss / self.args.accumulate).backward()
        terms = {"loss": loss, **terms}
        self.term_names = list(terms)
        self.pending.append((torch.stack([value.detach() for value in terms.values()]), self.videos))
        self.batches_done += 1
        if len(self.pending) == self.args.accumulate:
            self.update()

    def update(self) -> None:
        """One optimizer step: warm-up and cosine learning rate, clipped gradient, weight average."""
        self.set_learning_rates(self.global_step)
        average_gradients(self.model)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        norm = norm + 0 * sum(terms[0] for terms, _ in self.pending)             # nor is it finite if a loss is not
        if dist.is_initialized():
            dist.all_reduce(norm)
        bad = ~norm.isfinite()
        self.optimizer.found_inf = bad.float()           # where it is 1 AdamW does nothing, as under a GradScaler
        self.optimizer.step()                            # parameters without gradient (language, in turn) are skipped
        self.optimizer.zero_grad(set_to_none=True)
        if self.args.ema:
            average, current = list(self.ema.values()), [p.detach() for _, p in trained_parameters(self.model)]
            torch._foreach_lerp_(average, current, [(1 - self.args.ema) * (~bad).float()] * len(average))
        for mean, before in zip(self.running_means(), self.before):
            mean.copy_(torch.where(bad, before, mean))
        self.global_step += 1
        self.unseen.append((self.global_step, norm, self.pending))
        self.pending = []
        self.pause(save=self.args.save_every and self.global_step % self.args.save_every == 0)

    def set_learning_rates(self, step: int) -> None:
        factor = lr_factor(step, self.steps_per_epoch, self.args.epochs, self.args.warmup_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def look(self) -> None:
        """Were the steps since the last look finite? One that was not stops the run, or with --skip-non-finite is
        said. A GPU is waited for here and nowhere else in a step."""
        steps, self.unseen = self.unseen, []
        norms, found = torch.stack([norm for _, norm, _ in steps]).tolist() if steps else [], []
        for (step, _, batches), norm in zip(steps, norms):
            if math.isfinite(norm):
                self.terms += [terms for terms, _ in batches]
                continue
            suspects = [batch for batch in batches if not batch[0].isfinite().all()] or batches
            values = dict(zip(self.term_names, suspects[0][0].tolist())) | {"norm of the gradient": norm}
            found.append(f"step {step}: expected a finite loss and gradient, found "
                         + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                         + f"; videos: {', '.join(name for _, names in suspects for name in names)}")
        if found and not self.args.skip_non_finite:
            self.save()
            raise InputError(f"{found[0]}; nothing of this step was kept. Look at these videos, or lower --lr; "
                             f"--resume goes on after it, and --skip-non-finite leaves out all such steps")
        for line in found:
            print(f"skipped {line}")

    def pause(self, save: bool) -> None:
        """Between two steps: write the checkpoint if it is time for it or a signal came, and stop after a signal."""
        if len(self.unseen) >= (50 if self.device.type == "cuda" else 1):
            self.look()
        number = self.signals.received
        if save or number:
            self.save()
        if number:
            raise Stopped(number, f" in epoch {self.epoch + 1}/{self.args.epochs} after {self.batches_done} of its "
                                  f"batches, {self.global_step} steps in all; --resume goes on from here")

    def save(self) -> None:
        """Write the checkpoint, of steps that were looked at. Returns when it is written, in every process."""
        self.look()
        if self.out and first_process():
            save_checkpoint(self.out / "checkpoint.safetensors", self)
        if dist.is_initialized():
            dist.barrier()

    def end_epoch(self) -> dict:
        """Mean of every term over the epoch, and all processes."""
        if self.pending:
            self.update()
        self.look()
        if not self.terms:
            raise InputError(f"epoch {self.epoch + 1}: expected steps of finite loss, found none; lower --lr")
        terms = torch.stack(self.terms).mean(0)
        if dist.is_initialized():
            dist.all_reduce(terms)
            terms /= dist.get_world_size()
        means = dict(zip(self.term_names, terms.tolist()))
        self.terms, self.batches_done, self.epoch = [], 0, self.epoch + 1
        return means | {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(time.time() - self.started, 2)}


def main(argv=None) -> int:
    """The whole run. Returns the exit code: 0, 2 after a mistake in flags or files, 130 or 143 after a signal."""
    args = get_args(argv)
    try:
        with StopSignals() as signals:
            run_all(args, signals)
        return 0
    except Stopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        return stopped.code
    except (InputError, OSError, SafetensorError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(f"train.py: error: the memory of the GPU is full; lower --batch-size (raise --accumulate by as much), or "
              f"--window, with --grad-checkpoint on and --dtype bfloat16: {error}", file=sys.stderr)
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        print(f"train.py: error: --deterministic: {error}", file=sys.stderr)
    return 2


def run_all(args, signals: StopSignals) -> None:
    """Data, model, Algorithm 1, evaluation, report."""
    be_deterministic(args.deterministic)
    join_processes(args)
    torch.manual_seed(args.seed)
    out = Path(args.out)
    with first_process_first():
        open_folder(out, args)
        training, test, descriptions = load_data(args)
        config = load_config(args, training, descriptions)
    model = build_model(config, args).to(args.device)
    if not args.resume:
        some = range(0, len(training), max(1, len(training) // 16))              # 16 videos or a few more
        model.calibrate(collate([training[i]], model.multiple).to(args.device) for i in some)
    same_start(model, args.seed)
    windows = len(training) / process_rank()[1]
    run = Run(model, args, math.ceil(windows / args.batch_size / args.accumulate), signals)
    if args.resume:
        load_checkpoint(out / "checkpoint.safetensors", run)
    (dry_run if args.dry_run else train)(run, training, test, out)


def build_model(config: Config, args) -> ActionVLM:
    """The model with its published weights, checked against the lengths that the flags ask for."""
    model = ActionVLM(config)
    if model.vision is not None and args.vision != "tiny" and not args.resume:
        unused = model.vision.load(args.vision)
        print(f"--vision {args.vision}: {config.vision['num_hidden_layers']} layers of width {model.vision.dim}"
              + (f"; not used: {', '.join(unused[:6])}{', ...' if unused[6:] else ''}" if unused else ""))
    if model.language is not None:
        model.language.check_length(args.resize_to or args.window)
    if args.grad_checkpoint == "on":
        model.checkpointing()
    if args.compile:
        model.compile_layers()
    return model


def open_folder(out: Path, args) -> None:
    """Make --out ready: a new run needs a folder without another run's files, or --overwrite."""
    if not first_process():
        return
    found = [name for name in FILES if (out / name).exists()]
    if args.resume and "checkpoint.safetensors" not in found:
        raise InputError(f"--resume: expected checkpoint.safetensors of an earlier run in --out {out}, found none; "
                         f"start without --resume, or name another folder")
    if not (args.resume or args.dry_run):
        if found and not args.overwrite:
            raise InputError(f"--out {out}: expected a folder without a run, found {', '.join(found)}; go on with "
                             f"--resume, start over with --overwrite, or name another folder")
        for name in found:
            (out / name).unlink()
        if args.lm == "tiny":              # another run's tokenizer knew other descriptions, or it is only half written
            shutil.rmtree(out / "tiny-lm", ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: expected a folder that can be written to, found: {error.strerror}; "
                         f"name another one") from error


def train(run: Run, training: TALDataset, test: TALDataset, out: Path) -> None:
    """Algorithm 1 over all epochs, then the evaluation."""
    args, model, run.out = run.args, run.model, out
    loader = make_loader(run, training)
    describe(run, training, test)
    started, first, writes = time.time(), run.epoch, first_process()             # one process writes
    if writes:
        trim_log(out / "log.jsonl", run.epoch)
    with run.signals.deferred(), dead_workers_named(training):
        run.pause(save=True)
        for epoch in range(run.epoch, args.epochs):
            with_language = model.language is not None and (epoch % 2 == 1 or not model.config.use_vision)
            terms = (vision_language_epoch if with_language else vision_only_epoch)(run, loader)
            left = (time.time() - started) / (run.epoch - first) * (args.epochs - run.epoch)
            if writes:
                log_epoch(out, run, "vision-language" if with_language else "vision-only", terms, left)
            run.pause(save=True)
    use_average(run)
    results, _ = score_test_set(model, test, args, args.tiou, out)
    if not writes:
        return
    with written_whole(out / "report.png") as beside:
        figures.report(beside, read_log(out / "log.jsonl"), test.videos, results, model.config.descriptions)
    print(f"{time.time() - started:.0f} s; wrote {', '.join(FILES)} to {out}")


def dry_run(run: Run, training: TALDataset, test: TALDataset, out: Path) -> None:
    """What was found, how large it is, and one training step with everything; leaves no checkpoint and no log."""
    describe(run, training, test)
    language, L = run.model.language, run.args.window
    if language is not None:
        print(f"tokens of a window: {4 * L} for {L} frames + {len(language.prompt_ids)} for the prompt = "
              f"{language.sequence_length(L)}, then the answer")
    print(f"memory, about: {estimate_memory(run)}")
    few = copy(training)
    few.items = few.items[:run.args.batch_size]
    terms = (vision_language_epoch if language else vision_only_epoch)(run, make_loader(run, few))
    print("one step: " + "  ".join(f"{k} {v:.4f}" for k, v in terms.items()))
    if run.device.type == "cuda":
        print(f"peak memory of it on the GPU: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def log_epoch(out: Path, run: Run, kind: str, terms: dict, seconds_left: float) -> None:
    """One line on the screen, one in log.jsonl; the class means after a vision-only epoch."""
    shown = "  ".join(f"{k} {v:.4f}" for k, v in terms.items() if k not in ("lr", "seconds"))
    print(f"epoch {run.epoch:3d}/{run.args.epochs} {kind:15s} {shown}  lr {terms['lr']:.1e}  "
          f"{terms['seconds']:.0f} s, {seconds_left / 60:.1f} min left")
    row = {"epoch": run.epoch, "step": run.global_step, "kind": kind, **terms}
    if kind == "vision-only":
        names = [*run.model.config.classes, "background"]
        row["class_mean"] = {n: round(m, 4) for n, m in zip(names, run.model.class_mean.mean().tolist())}
        print("          class means: " + ", ".join(f"{n} {m:.3f}" for n, m in row["class_mean"].items()))
    append_row(out / "log.jsonl", row)


# ------------------------------------------------------------------------------------------------ processes
def join_processes(args) -> None:
    """Under torchrun: join the others, take a GPU of one's own, and leave printing to the first process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if not first_process():
        sys.stdout = open(os.devnull, "w")


def first_process() -> bool:
    return process_rank()[0] == 0


@contextmanager
def first_process_first():
    """The others enter when the first process has left: it writes files that they read."""
    if not first_process():
        dist.barrier()
    yield
    if first_process() and dist.is_initialized():
        dist.barrier()


def same_start(model: ActionVLM, seed: int) -> None:
    """What is trained starts the same in all processes; their random numbers differ from here on."""
    if dist.is_initialized():
        for tensor in model_state(model).values():
            dist.broadcast(tensor, 0)
        if not first_process():
            torch.manual_seed(seed + 1000 * dist.get_rank())


def be_deterministic(on: bool) -> None:
    """Only algorithms that give the same bits in every run, or none but torch's usual choice."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")              # read when CUDA starts
        torch.backends.cudnn.benchmark = False
    if on != torch.are_deterministic_algorithms_enabled():                       # this call loads much of torch
        torch.use_deterministic_algorithms(on)


def average_gradients(model: ActionVLM) -> None:
    """Every gradient becomes its mean over all processes, which run the same kind of epoch; does nothing in one.

    The losses are then those of all windows together: see `data.mean_over_all`.
    """
    if dist.is_initialized():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        together = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))


# ------------------------------------------------------------------------------------------------ setup
def get_args(argv=None) -> argparse.Namespace:
    """Flags; the preset of --dataset gives the defaults, another one with --features; the command line wins."""
    parser = build_parser()
    known = parser.parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS[known.dataset] | (FEATURE_PRESETS.get(known.dataset, {}) if known.features else {}))
    return check_args(parser, parser.parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Every flag with its unit; the defaults are the paper's THUMOS14 recipe, end to end."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data").add_argument
    group("--dataset", choices=sorted(PRESETS), default="demo", help="preset of flags (data.PRESETS)")
    group("--videos", help="folder of video files named as in the annotations: end to end")
    group("--features", help="folder of NAME.npy (T, V): instead of --videos")
    group("--annotations", help="ActivityNet-format JSON, plain or gzip; or a csv file of THUMOS14 or EPIC-Kitchens, "
                                "or the folder of them")
    group("--labels", choices=["verb", "noun"], default="verb", help="what is to be found in EPIC-Kitchens-100")
    group("--descriptions", help="JSON {label: sentence from start pose to end pose}")
    group("--train-subset", default="training", help="subset name to train on, in any case")
    group("--test-subset", default="validation", help="subset name to evaluate on")
    group("--leave-out", nargs="+", default=[], metavar="VIDEO", help="videos to leave out of both subsets")
    group("--skip-missing", action="store_true", help="go on without the videos that have no file")
    group("--window", type=int, default=768, help="L, steps of a window")
    group("--stride", type=int, default=4, help="video frames per step")
    group("--num-frames", type=int, default=0, help="video frames that one feature sees (I3D: 16; 0 end to end)")
    group("--frames-per-step", type=int, default=1, help="frames read for a step, at even distances (end to end)")
    group("--resize-to", type=int, default=0, help="steps that every whole video is resized to (0 = cut into windows)")
    group("--fps", type=float, default=0.0, help="frames per second (0 = what the annotations, else the file, say)")
    group("--min-overlap", type=float, default=0.5, help="share of a segment inside a training window for it to count")
    group("--image-size", type=int, default=160, help="side of the crop, pixels")
    group("--resize", type=int, default=182, help="short side before the training crop, pixels")
    group("--workers", type=int, default=0, help="processes that read data (0 = the main one)")
    group = parser.add_argument_group("model").add_argument
    group("--vision", default="tiny", help="VideoMAE file or folder, or InternViT folder (tiny = a small random one)")
    group("--lm", default="tiny", help="folder or name of a causal language model or InternVL3 (tiny: small, random)")
    group("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if gpu else "float32",
          help="of frozen weights and of encoder's and language model's arithmetic; what is trained stays float32 "
               "(default: bfloat16 on a GPU)")
    group("--lora-rank", type=int, default=128, help="rank of the LoRA matrices")
    group("--lora-alpha", type=float, default=256, help="LoRA scale times rank")
    group("--layout", choices=["frames-first", "text-first"], default="frames-first", help="token order, see vlm.py")
    group("--lambda-lang", type=lambda_lang, default="learned", metavar="{learned,generated,0..1}",
          help="weight of language: learned (Eq. 4), or of Table 4: generated by the language model, or a fixed number "
               "(0 = vision only)")
    group("--features-used", choices=["both", "language"], default="both",
          help="F_vis and F_lang in Eq. 5, or F_lang alone (Table 2)")
    group("--lang-tokens", choices=["special", "shared", "vision"], default="special",
          help="tokens whose hidden states are F_lang: three special ones, one for all, or vision tokens (Table 9 b)")
    group("--prompt", choices=["descriptions", "labels"], default="descriptions",
          help="actions in the prompt: with their descriptions, or their names alone (Table 9 a)")
    group("--levels", type=int, default=6, help="levels of the pyramid")
    group("--width", type=int, default=512, help="width of the head")
    group("--head-window", type=int, default=19, help="attention window of the head in steps (0 = global)")
    group("--ranges", type=level_ranges,
          help="JSON list of [low, high] per level: boundary distances it finds, in steps")
    group("--prior", type=float, default=0.01, help="probability that every class starts at")
    group = parser.add_argument_group("training").add_argument
    group("--epochs", type=int, default=120, help="epochs, vision-only and vision-language in turn (0 = only evaluate)")
    group("--warmup-epochs", type=float, default=5, help="epochs of linear warm-up")
    group("--batch-size", type=int, default=1, help="windows at a time (in every process)")
    group("--accumulate", type=int, default=1, help="batches whose gradients make one step")
    group("--drop-path", type=float, default=0.1, help="probability that a branch of the head is skipped in training")
    group("--lr", type=float, default=1e-4, help="learning rate of head, projection, special tokens, FC")
    group("--lr-vision", type=float, default=5e-6, help="learning rate of the vision encoder")
    group("--lr-lm", type=float, default=5e-6, help="learning rate of LoRA")
    group("--weight-decay", type=float, default=0.05, help="on weights of linear and convolution layers")
    group("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group("--ema", type=float, default=0.999, help="decay of the weight average used at evaluation (0 = off)")
    group("--lambda-loc", type=float, default=1.0, help="weight of the DIoU loss (Eq. 6)")
    group("--lambda-tg", type=float, default=0.1, help="weight of the text generation loss (Eq. 9)")
    group("--lambda-adv", type=float, default=0.1, help="weight of the advantage loss (Eq. 9)")
    group("--label-smoothing", type=float, default=0.0, help="share of the class targets spread over all classes")
    group = parser.add_argument_group("run").add_argument
    group("--out", default="out", help="folder for everything the run writes")
    group("--resume", action="store_true", help="go on from OUT/checkpoint.safetensors")
    group("--overwrite", action="store_true", help="start over in a folder that holds another run")
    group("--save-every", type=int, default=200, help="steps between two checkpoints (0 = only after an epoch)")
    group("--skip-non-finite", action="store_true", help="leave out steps of a loss or gradient that is not finite")
    group("--tiou", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7], help="tIoU thresholds of the evaluation")
    group("--nms-sigma", type=float, default=0.5, help="sigma of soft-NMS")
    group("--voting", type=float, default=0.0, help="tIoU of segment voting after it (0 = off)")
    group("--max-per-class", type=int, default=0, help="most detections of a class in a video (0 = no limit)")
    group("--max-per-video", type=int, default=200, help="most detections of a video (0 = no limit)")
    group("--external-scores", help="JSON of video-level class scores: the head finds actions without class, and these "
                                    "say which")
    group("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    group("--deterministic", action="store_true", help="the same bits in every run on one machine, slower on a GPU")
    group("--device", type=device, default="cuda" if gpu else "cpu", help="cuda or cpu")
    group("--grad-checkpoint", choices=["on", "off"], default="on" if gpu else "off",
          help="compute activations of encoder and language model again in the backward pass: less memory, more time")
    group("--compile", action="store_true",
          help="compile the layers of encoder and language model: slow first steps, then faster ones; needs a compiler")
    group("--dry-run", action="store_true", help="load everything, say what was found, run one batch, train nothing")
    return parser


MANY, ABOVE_0, BELOW_1 = 10 ** 9, 1e-9, 0.999999
RANGES = dict(                                                                   # flag=(lowest, highest)
    window=(1, MANY), stride=(1, MANY), num_frames=(0, MANY), frames_per_step=(1, MANY), resize_to=(0, MANY),
    fps=(0, 1000), min_overlap=(0, 1), image_size=(1, MANY), resize=(1, MANY), workers=(0, 1024), lora_rank=(1, MANY),
    lora_alpha=(0, MANY), levels=(1, 30), width=(1, MANY), head_window=(0, MANY), prior=(ABOVE_0, BELOW_1),
    epochs=(0, MANY), warmup_epochs=(0, MANY), batch_size=(1, MANY), accumulate=(1, MANY), drop_path=(0, BELOW_1),
    lr=(0, MANY), lr_vision=(0, MANY), lr_lm=(0, MANY), weight_decay=(0, MANY), clip=(ABOVE_0, MANY), ema=(0, BELOW_1),
    lambda_loc=(0, MANY), lambda_tg=(0, MANY), lambda_adv=(0, MANY), label_smoothing=(0, 1), tiou=(ABOVE_0, 1),
    nms_sigma=(ABOVE_0, MANY), voting=(0, 1), max_per_class=(0, MANY), max_per_video=(0, MANY), save_every=(0, MANY),
    seed=(0, MANY))


def check_args(parser, args):
    """Flags that are out of range, contradict each other or lack one another."""
    if args.features and args.dataset == "demo":
        parser.error("--features: the demo reads videos; say --dataset custom")
    if bool(args.videos) == bool(args.features):
        parser.error("expected either --videos DIR (end to end) or --features DIR")
    if args.features and args.vision != "tiny":
        parser.error("--vision: with --features there is no vision encoder; leave one of them out")
    for flag in ("annotations", "descriptions"):
        if not getattr(args, flag):
            parser.error(f"expected --{flag} FILE")
    if args.features_used == "language" and args.lambda_lang != "learned":
        parser.error("--features-used language: there is nothing to weigh; leave out --lambda-lang")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite starts over: leave out one of them")
    check_ranges(parser, args, RANGES)
    steps, top = args.resize_to or args.window, 2 ** (args.levels - 1)
    if steps < top:
        parser.error(f"--levels {args.levels}: expected windows of at least {top} steps, one for the top level of the "
                     f"pyramid, found {steps}; lower --levels, or raise --window or --resize-to")
    if args.ranges and len(args.ranges) != args.levels:
        parser.error(f"--ranges: expected one [low, high] for each of {args.levels} levels, found {len(args.ranges)}")
    if args.width % 4:
        parser.error(f"--width: expected a multiple of the head's 4 attention heads, found {args.width}")
    patch = TINY_VISION["patch_size"]
    if args.videos and args.vision == "tiny" and args.image_size % patch:
        parser.error(f"--image-size: expected a multiple of the patches of {patch} pixels, found {args.image_size}")
    return args


def level_ranges(text: str) -> list:
    """argparse type of --ranges."""
    try:
        rows = [[float(low), float(high)] for low, high in json.loads(text)]
        if all(0 <= low < high for low, high in rows):
            return rows
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    raise argparse.ArgumentTypeError(f"expected a JSON list of [low, high] with 0 <= low < high, found {text}")


def lambda_lang(text: str):
    """argparse type of --lambda-lang."""
    if text in ("learned", "generated"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 'learned', 'generated' or a number from 0 to 1, found {text}")
    return value


def load_data(args, feature_dim: int = 0):
    """(training data set, test data set, descriptions) from the flags. feature_dim: V that features have to have (0 =
    that of the first training video)."""
    if args.dataset == "demo":
        make_demo(Path(args.annotations).parent)
    notes = []
    videos = load_annotations(args.annotations, args.labels, notes)
    classes = class_names(args.annotations, videos, args.labels)
    descriptions = load_descriptions(args.descriptions, classes, notes)
    if args.prompt == "labels":
        descriptions = {label: "" for label in descriptions}                     # Table 9 (a)
    folder, suffixes = (args.videos, VIDEO_SUFFIXES) if args.videos else (args.features, (".npy",))
    common = dict(classes=classes, window=args.window, stride=args.stride, num_frames=args.num_frames, seed=args.seed,
                  image_size=args.image_size if args.videos else 0, resize_to=args.resize_to,
                  frames_per_step=args.frames_per_step)
    sets = []
    for subset in (args.train_subset, args.test_subset):
        chosen = [v for v in subset_of(videos, subset, args.annotations) if v.name not in args.leave_out]
        if not chosen:
            raise InputError(f"--leave-out: expected to keep some videos of subset '{subset}', found all of them named")
        chosen = find_files(chosen, folder, suffixes, args.skip_missing or args.dry_run, notes)
        sets.append([with_fps(v, args) for v in chosen])
    if not any(v.labels for v in sets[0]):
        raise InputError(f"{args.annotations}: expected actions to train on, found {len(sets[0])} videos of "
                         f"--train-subset {args.train_subset} without a single segment; choose an annotated subset")
    if args.features:
        common["feature_dim"] = feature_dim or open_features(sets[0][0].path).shape[1]
    training = TALDataset(sets[0], training=True, min_overlap=args.min_overlap, resize=args.resize, **common)
    test = TALDataset(sets[1], **common)
    for note in notes + doubt_steps(test):
        print(f"note: {note}", file=sys.stderr)
    return training, test, descriptions


def with_fps(video, args):
    """The video with its frame rate: --fps, else from the annotations, else from the file."""
    fps = args.fps or video.fps or (probe(video.path)[1] if args.videos else 0)
    if not fps and not args.resize_to:
        raise InputError(f"{args.annotations}: video '{video.name}': expected fps, found none; add it or give --fps")
    return replace(video, fps=fps)


def load_config(args, training: TALDataset, descriptions: dict) -> Config:
    """The model's Config from flags and data; writes the tiny language model if that is asked for."""
    lm = args.lm
    if lm == "tiny":
        lm = str(Path(args.out) / "tiny-lm")
        answers = [proposal_text(v.segments.tolist(), v.labels) for v in training.videos]
        make_tiny_lm(lm, [instruction(descriptions), *answers])
    vision = {} if args.features else dict(TINY_VISION, image_size=args.image_size) if args.vision == "tiny" else \
        vision_config(args.vision, args.image_size)
    return Config(
        descriptions=descriptions, lm=lm, dim=language_config(lm).hidden_size, dtype=args.dtype,
        lora_rank=args.lora_rank, lora_alpha=args.lora_alpha, layout=args.layout, vision=vision,
        lang_tokens=args.lang_tokens, use_vision=args.features_used == "both",
        feature_dim=training.feature_dim,
        lambda_lang=None if args.lambda_lang == "learned" else args.lambda_lang,
        width=args.width, levels=args.levels, head_window=args.head_window, ranges=args.ranges, prior=args.prior,
        drop_path=args.drop_path, class_agnostic=bool(args.external_scores))


def make_loader(run: "Run", dataset: TALDataset) -> DataLoader:
    """Shuffled batches; the order depends on seed and epoch alone. Of several processes each has its share."""
    generator = torch.Generator()
    sampler = DistributedSampler(dataset, seed=run.args.seed) if dist.is_initialized() else \
        RandomSampler(dataset, generator=generator)
    return batch_loader(dataset, run.model.multiple, run.args.workers, generator=generator,
                        batch_sampler=BatchesFrom(sampler, run.args.batch_size, drop_last=False))


class BatchesFrom(BatchSampler):
    """The batches of an epoch from number `first` on: those before are not read again when an epoch is resumed."""
    first = 0

    def __iter__(self):
        return islice(super().__iter__(), self.first, None)


# ------------------------------------------------------------------------------------------------ optimization
def parameter_groups(model: ActionVLM, args) -> list:
    """AdamW groups: head, vision, lm (LoRA), each with its learning rate; decay on linear and convolution weights."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv3d))}
    groups = {}
    for name, parameter in trained_parameters(model):
        part = "vision" if name.startswith("vision.") else "lm" if name.startswith("language.lm.") else "head"
        groups.setdefault((part, id(parameter) in decayed), []).append(parameter)
    rates = {"head": args.lr, "vision": args.lr_vision, "lm": args.lr_lm}
    return [dict(params=p, name=part, lr=rates[part], base_lr=rates[part],
                 weight_decay=args.weight_decay if decay else 0.0) for (part, decay), p in groups.items()]


def lr_factor(step: int, steps_per_epoch: int, epochs: int, warmup_epochs: float) -> float:
    """Linear warm-up, then cosine to zero, per step; in [0, 1]."""
    warmup, total = round(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch
    if step < warmup:
        return step / max(1, warmup - 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def describe(run: Run, training: TALDataset, test: TALDataset) -> None:
    """Print what was found: videos, segments, classes; parameters, trained by group, and frozen."""
    for name, data in (("training", training), ("test", test)):
        print(f"{name}: {len(data.videos)} videos, {sum(len(v.labels) for v in data.videos)} segments, "
              f"{sum(v.duration for v in data.videos) / 3600:.2f} h, {len(data)} windows")
    counts, rates = {"head": 0, "vision": 0, "lm": 0}, {}
    for group in run.optimizer.param_groups:
        counts[group["name"]] += sum(p.numel() for p in group["params"])
        rates[group["name"]] = group["base_lr"]
    trained = ", ".join(f"{part} {count:,} (lr {rates[part]:g})" for part, count in counts.items() if count)
    frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    print(f"{len(run.model.config.classes)} classes; trained parameters: {trained}; frozen: {frozen:,}")


def estimate_memory(run: Run) -> str:
    """Gigabytes of a training step: frozen weights; trained ones with gradient, AdamW's two moments and average;
    activations, about 10 D + 3 F numbers a token and layer, with checkpointing D and one layer in full."""
    model, args = run.model, run.args
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for _, p in trained_parameters(model)) * (5 if args.ema else 4)

    def activations(config, tokens, size):
        D, full = config.hidden_size, 10 * config.hidden_size + 3 * config.intermediate_size
        return args.batch_size * tokens * size * (D * config.num_hidden_layers + full if args.grad_checkpoint == "on"
                                                  else full * config.num_hidden_layers)
    passed = 0
    if model.vision is not None:
        side = model.config.vision["image_size"] // model.config.vision["patch_size"]
        passed += activations(model.vision.backbone.config, args.window // model.vision.tubelet * side ** 2, 4)
    if model.language is not None:
        passed += activations(model.language.lm.config, model.language.sequence_length(args.window),
                              model.language.lm.dtype.itemsize)
    return (f"frozen weights {frozen / 2**30:.2f} GiB, trained weights with optimizer {trained / 2**30:.2f} GiB, "
            f"activations of encoder and language model {passed / 2**30:.2f} GiB; the head's come on top")


if __name__ == "__main__":
    sys.exit(main())
