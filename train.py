"""train.py - Algorithm 1 (paper §3.3, §3.6): vision-only and vision-language epochs in turn.
    python train.py                                 # the demo: minutes on a CPU
    python train.py --dataset custom --features DIR --annotations FILE --descriptions FILE
    python train.py --dataset custom --videos DIR --annotations FILE --descriptions FILE
    python train.py ... --dry-run                   # load everything, run two steps, write nothing
    python train.py ... --resume                    # go on from the checkpoint in --out
    torchrun --nproc_per_node 4 train.py ...        # on several GPUs; --batch-size is of each"""
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import BatchSampler, DistributedSampler
from tqdm import tqdm

from advantage import advantage_loss, language_advantage
from data import batch_loader, load_data
from evaluate import detect, score
from head import detection_loss
from model import ActionVLM, Config
from support import checkpoint, commands, figures, flags, processes, summary
from support.annotations import expect
from support.language_models import language_config
from support.weights import vision_config

def vision_only_epoch(model, batches, backpropagate, resumed=False):
    """Algorithm 1, lines 1-8: train without language, and note the mean loss of every class."""
    model.train()
    if not resumed:
        model.class_means.reset()                                         # line 2: all start at 0
    for batch in batches:                                                 # line 3
        output = model(batch, use_language=False)
        loss = detection_loss(output, batch, model.head)                  # line 4: L_v, Eq. 6
        model.class_means.add(                                            # line 5
            loss.per_frame, batch.frame_class, batch.mask)
        backpropagate(loss.total, batch,                                  # line 6
                      loss_cls=loss.cls, loss_loc=loss.loc)

def vision_language_epoch(model, batches, backpropagate, lambda_tg=0.1, lambda_adv=0.1):
    """Algorithm 1, lines 9-18: train with language, weighted by the advantage [adv] predicts."""
    model.train()
    class_mean = model.class_means.mean()                                 # of the epoch before
    for batch in batches:                                                 # line 10
        output = model(batch)                                             # lines 11-12: Eq. 2, 4, 5
        loss = detection_loss(output, batch, model.head)                  # line 13: L_vl, Eq. 6
        loss_tg = output.text_loss                                        # line 13: L_tg, Eq. 8
        advantage = language_advantage(                                   # line 14: A_lang, Eq. 1
            class_mean, loss.per_frame, batch.frame_class)
        loss_adv = advantage_loss(                                        # line 15: L_adv, Eq. 3
            output.advantage, advantage, batch.mask)
        total = loss.total + lambda_adv * loss_adv + lambda_tg * loss_tg  # line 16: Eq. 9
        backpropagate(total, batch, loss_cls=loss.cls, loss_loc=loss.loc, loss_tg=loss_tg,
                      loss_adv=loss_adv, lambda_lang=output.lambda_lang, advantage=advantage)

def train(model, training_set, args, out=None, signals=None, test_set=None):
    """Both kinds of epoch in turn ("alternating-epoch estimation"), a checkpoint after each."""
    batches_per_epoch = len(epoch_loader(model, training_set, 0, args))
    state = TrainingState(model, args, batches_per_epoch, out, signals, test_set)
    if args.resume:
        checkpoint.resume(out / "checkpoint.safetensors", state)
    state.began = time.time(), state.epoch
    model = processes.parallel(model, args.seed + state.step)
    state.save()
    while state.epoch < args.epochs:
        batches, resumed = state.batches(training_set), state.batches_done > 0
        if state.epoch % 2 == 0 or state.model.language is None:
            vision_only_epoch(model, batches, state.backpropagate, resumed)
            processes.average(*model.class_means.buffers())
            state.end_epoch("vision-only")
        else:
            vision_language_epoch(model, batches, state.backpropagate,
                                  args.lambda_tg, args.lambda_adv)
            state.end_epoch("vision-language")
    return state

class TrainingState:
    """All that a checkpoint holds: model, optimizer, weight average, place in the run, log sums."""
    def __init__(self, model, args, batches_per_epoch, out=None, signals=None, test_set=None):
        self.model, self.args, self.signals, self.test_set = model, args, signals, test_set
        self.out = None if processes.rank() else out        # the first process writes
        self.batches_per_epoch = batches_per_epoch
        self.optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)
        parameters = checkpoint.trained_parameters(model)   # averaged in ema, unless --ema is 0
        self.ema = {name: p.detach().clone() for name, p in parameters if args.ema}
        self.epoch, self.batches_done, self.step = 0, 0, 0  # batches_done: of this epoch
        self.sums = {}                                      # {term of the log: sum over batches}

    def batches(self, training_set):
        """Batches on the device, from the place in the epoch on, behind a progress bar."""
        self.started = time.time()
        loader = epoch_loader(self.model, training_set, self.epoch, self.args, self.batches_done)
        bar = tqdm(loader, f"epoch {self.epoch + 1}/{self.args.epochs}", self.batches_per_epoch,
                   leave=False, dynamic_ncols=True, initial=self.batches_done,
                   disable=True if processes.rank() else None)     # None: shown on a terminal
        for batch in bar:
            yield batch.to(self.args.device)

    def backpropagate(self, total, batch, **terms):
        """Gradients of one batch; after --accumulate batches, or the last one, an optimizer step.
        total: () the loss. terms: of the log, () or (B, L), of which real frames count."""
        (total / self.args.accumulate).backward()
        processes.average(*self.model.running_means())                   # also M of Eq. 6
        values = {}
        for name, term in {"loss": total, **terms}.items():
            if term.ndim:
                term = term[batch.mask].mean()
            values[name] = term.item()
            self.sums[name] = self.sums.get(name, 0.0) + values[name]
        self.batches_done += 1
        last = self.batches_done == self.batches_per_epoch
        update = last or self.batches_done % self.args.accumulate == 0
        if update:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
            values["norm"] = norm.item()
        found = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        expect(all(map(math.isfinite, values.values())), f"step {self.step + 1}",
               "a finite loss and gradient", f"{found} in videos {', '.join(batch.names)}",
               "look at these videos, or lower --lr, --lr-lm or --lr-vision; --resume goes on "
               "from the last checkpoint")
        if update:
            self.update()

    def update(self):
        """One optimizer step: learning rate, AdamW, weight average."""
        steps_per_epoch = math.ceil(self.batches_per_epoch / self.args.accumulate)
        done = self.epoch * steps_per_epoch + (self.batches_done - 1) // self.args.accumulate
        factor = lr_factor(done, steps_per_epoch, self.args.epochs, self.args.warmup_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()              # skips parameters without gradient: language, in turn
        self.optimizer.zero_grad()
        if self.args.ema:
            for name, parameter in checkpoint.trained_parameters(self.model):
                self.ema[name].lerp_(parameter.detach(), 1 - self.args.ema)
        self.step += 1
        stop = self.signals is not None and self.signals.received
        if stop or self.args.save_every and self.step % self.args.save_every == 0:
            self.save()
        if stop:
            raise checkpoint.Stopped(stop)

    def end_epoch(self, kind):
        """A row of the log, a checkpoint, and on to the next epoch."""
        means = torch.tensor(list(self.sums.values()), device=self.args.device)
        means /= self.batches_done
        processes.average(means)
        terms = dict(zip(self.sums, means.tolist()))
        self.sums, self.batches_done, self.epoch = {}, 0, self.epoch + 1
        if self.out is not None:
            if self.args.eval_every and self.epoch % self.args.eval_every == 0:
                terms["mAP"] = self.evaluate()
            summary.log_epoch(self.out / "log.jsonl", self, kind, terms)
        self.save()

    def evaluate(self):
        """Average mAP of the averaged weights now, in [0, 1]; best.safetensors keeps the best."""
        trained = checkpoint.trained_parameters(self.model)
        live = {name: parameter.detach().clone() for name, parameter in trained}
        self.model.load_state_dict(self.ema, strict=False)
        predictions = detect(self.model, self.test_set, self.args).predictions
        self.model.load_state_dict(live, strict=False)
        self.model.train()
        result = score(self.out / "result.json", self.test_set, predictions, self.args.tiou)
        average = result["average"]
        log = checkpoint.read_log(self.out / "log.jsonl")
        before = [row["mAP"] for row in log if "mAP" in row]
        if not before or average > max(before):
            self.save(checkpoint.BEST)
        return average

    def save(self, name="checkpoint.safetensors"):
        if self.out is not None:
            checkpoint.save_checkpoint(self.out / name, self)

def parameter_groups(model, args):
    """AdamW groups: head, vision, lm (LoRA), each with its rate; decay on matrices of weights."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv3d)
    decayed = {module.weight for module in model.modules() if isinstance(module, layers)}
    rates = {"head": args.lr, "vision": args.lr_vision, "lm": args.lr_lm}
    groups = {}
    for name, parameter in checkpoint.trained_parameters(model):
        part = "head"
        if name.startswith("vision."):
            part = "vision"
        elif name.startswith("language.lm."):
            part = "lm"
        decay = args.weight_decay if parameter in decayed else 0.0
        groups.setdefault((part, decay), []).append(parameter)
    return [dict(params=parameters, name=part, base_lr=rates[part], weight_decay=decay)
            for (part, decay), parameters in groups.items()]

def lr_factor(step, steps_per_epoch, epochs, warmup_epochs):
    """Linear warm-up, then cosine to zero, per step; in [0, 1]."""
    warmup, total = round(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch
    if step < warmup:
        return step / max(1, warmup - 1)
    progress = min(1, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))

def epoch_loader(model, training_set, epoch, args, first=0):
    """Shuffled batches of one epoch, from number `first` on; each process has its share."""
    training_set.epoch = epoch
    count, rank = processes.world_size(), processes.rank()
    sampler = DistributedSampler(training_set, count, rank, seed=args.seed)
    sampler.set_epoch(epoch)
    batches = list(BatchSampler(sampler, args.batch_size, drop_last=False))
    return batch_loader(training_set, model.multiple, args.workers, batch_sampler=batches[first:])

get_args = partial(flags.train_args, __doc__)

def main(argv=None):
    """Returns the exit code: 0, 2 for a mistake in flags or files, 130 or 143 after a signal."""
    return commands.run_command("train.py", run, argv)

def run(argv):
    """Data, model, Algorithm 1, then the evaluation by the first process."""
    started, args = time.time(), get_args(argv)
    out = Path(args.out)
    processes.join(args)
    torch.manual_seed(args.seed)
    with processes.first_one_first():                  # it writes files that others read
        if processes.rank() == 0:
            checkpoint.open_folder(out, args)
        training_set, test_set, descriptions = load_data(args)
        model = build_model(args, build_config(args, training_set, descriptions))
    if not args.resume:
        some = range(0, len(training_set), max(1, len(training_set) // 16))   # 16 videos or more
        batches = batch_loader(training_set, model.multiple, 0, sampler=some)
        model.calibrate(batch.to(args.device) for batch in batches)
    if args.init and not args.resume:
        checkpoint.initialise(model, args.init)
    summary.describe(model, parameter_groups(model, args), training_set, test_set)
    if args.dry_run:
        return dry_run(model, training_set, args)
    with checkpoint.stop_signals() as signals:
        state = train(model, training_set, args, out, signals, test_set)
    if processes.rank():
        return
    model.load_state_dict(state.ema, strict=False)                         # averaged weights
    detections = detect(model, test_set, args)
    score(out / "result.json", test_set, detections.predictions, args.tiou)
    with checkpoint.written_whole(out / "report.png") as beside:
        log = checkpoint.read_log(out / "log.jsonl")
        figures.report(beside, log, test_set.videos, detections, model.config.descriptions)
    print(f"{time.time() - started:.0f} s; wrote {', '.join(checkpoint.FILES)} to {out}")

def build_config(args, training_set, descriptions):
    """The model's Config from flags and data."""
    vision = vision_config(args.vision, args.image_size) if args.videos else {}
    same = ("lora_rank", "lora_alpha", "dtype", "layout", "language_stride", "width", "levels",
            "head_window", "ranges", "drop_path", "prior", "lambda_loc", "label_smoothing")
    return Config(descriptions, "" if args.lambda_lang == 0 else args.lm,
                  dim=language_config(args.lm).hidden_size, feature_dim=training_set.feature_dim,
                  vision=vision, class_agnostic=bool(args.external_scores),
                  **{name: getattr(args, name) for name in same})

def build_model(args, config):
    """The model on its device, with published weights, checked against the length of a window."""
    model = ActionVLM(config)
    if args.ablation or args.lambda_lang not in ("learned", 0.0):
        from experiments.ablations import ablate  # one row of Tables 2, 4 and 9
        ablate(model, args)
    if args.videos and args.vision != "tiny" and not args.resume:
        unused = model.vision.load(args.vision)
        print(f"--vision {args.vision}: {config.vision['num_hidden_layers']} layers of width "
              f"{model.vision.dim}; not used: {', '.join(unused[:6]) or 'none'}")
    if model.language is not None:
        model.language.check_length(args.resize_to or args.window)
    if args.grad_checkpoint == "on":
        model.checkpointing()
    if args.compile:
        model.compile_layers()
    return model.to(args.device)

def dry_run(model, training_set, args):
    """Run two steps, the second with AdamW's moments in memory; writes nothing."""
    training_set.items = training_set.items[:args.batch_size]
    state = TrainingState(model, args, batches_per_epoch=1)
    epoch = vision_only_epoch if model.language is None else vision_language_epoch
    for _ in range(2):
        state.sums, state.batches_done = {}, 0
        epoch(model, state.batches(training_set), state.backpropagate)
    summary.describe_step(model, args, state.sums)

if __name__ == "__main__":
    sys.exit(main())
