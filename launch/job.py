"""The training run: what every rank does, from the text to the proof."""

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from choices import OPTIMIZERS, SIZES
from corpus import Corpus, read_corpus
from gpt import GPT, summed_loss
from notice import Interrupted, Notice
from options import Options, Refused
from proof import (
    Twin,
    chosen_kernels,
    consolidated,
    one_evaluation,
    own_gradients,
    rounding_of,
    verdict,
)
from ranks import Ranks
from recipe import build_optimizer, build_scheduler, names
from report import History, Report, bits, draw, memory_table, state_bytes
from saved_run import Start, extra_of, load_run, newest_step, prepare_run
from torch import Tensor

from shardopt import checkpoint, sched


class Job:
    """A run, new or resumed; every method is called on every rank.

    Every rank computes the same model on its own part of each global batch; the sharded optimizer
    averages the gradients (or DDP does), updates a part of the parameters on each rank and gathers
    them.

    Args:
        given: the options that were given, by name.
        ranks: the processes.

    Raises:
        Refused: on every rank, with one message.
    """

    def __init__(self, given: Mapping[str, Any], ranks: Ranks):
        self.ranks = ranks
        start = _agree_on_start(given, ranks)
        self.options, self.saved = start.options, start.saved
        self.first_step = self.step = start.step  # how many are done
        self.history = History(**start.history)
        self.corpus = _agree_on_corpus(self.options, ranks)
        self.reads_other_text = start.text not in (None, self.corpus.sha256)
        self.model = new_model(self.options).to(ranks.device)
        by_ddp = self.options.gradients == "replicated"
        self.replica = ranks.replicate(self.model) if by_ddp else self.model
        self.optimizer = build_optimizer(self.model, self.options, ranks.timeout.total_seconds())
        self.optimizer.overlap_forward(self.model)
        self.scheduler = build_scheduler(self.optimizer, self.options)
        if start.saved is not None:
            parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
            load_run(start, model=self.model, **parts)
            sched.check_schedules(self.scheduler)
        # DDP orders its buckets anew after the first backward, and with it the sums of three ranks
        # and more: after one that counts for nothing, a resumed run rounds like an undisturbed one.
        if by_ddp:
            self._backward(self.step)
        self.notice = Notice(ranks)
        self.seconds = 0.0  # of training, without evaluation and saving
        self.report = Report(ranks.is_first, first_step=self.step, steps=self.options.steps)

    def run(self) -> str | None:
        """Train, save, draw, prove; returns what the proof found wrong, or ``None``.

        Raises:
            Interrupted: on every rank, once the run is saved, if a signal has come to any.
        """
        self.report.say(self._introduction())
        if self.step == 0:
            self._evaluate()
        with self.notice:
            self._train()
        self.report.close()
        self._summarise()
        return self._prove()

    def _train(self) -> None:
        options = self.options
        while self.step < options.steps:
            notice = self._train_until(self._next_stop())
            if self._is_due(self.step, options.eval_every):
                self._evaluate()
            if notice or self._is_due(self.step, options.save_every):
                self.saved = self._save()
            if notice and self.step < options.steps:
                self.report.close()
                raise Interrupted(notice, str(self.saved))

    def _next_stop(self) -> int:
        """The next step after which something is to be done."""
        stop, every = self.step + 1, (self.options.eval_every, self.options.save_every)
        while not any(self._is_due(stop, number) for number in every):
            stop += 1
        return stop

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.options.steps or (every > 0 and step % every == 0)

    # -- training ------------------------------------------------------------------------------

    def _train_until(self, stop: int) -> int:
        """Up to ``stop`` steps in all, or to a notice; returns the signal, or 0."""
        started = time.perf_counter()
        shares, notice = [], 0
        while self.step < stop and not notice:
            self.notice.ask()
            self.history.lr.append(float(self.optimizer.param_groups[0]["lr"]))
            shares.append(self._step())
            if self.options.scheduler != "plateau":  # which evaluations step
                self.scheduler.step()
            self.step += 1
            notice = self.notice.came()
            self.report.stepped(shares[-1] * self.ranks.world_size)
        self.ranks.wait_for_device()
        self.seconds += time.perf_counter() - started
        # One exchange for the losses of all these steps.
        self.history.training += self.ranks.sum(torch.stack(shares)).tolist()
        return notice

    def _step(self) -> Tensor:
        """One step of the optimizer; returns this rank's share of the loss before it."""
        shares: list[Tensor] = []

        def evaluate() -> Tensor:
            shares.append(self._backward(self.step))
            return shares[-1] * self.ranks.world_size

        if self._evaluates:
            self.optimizer.step(evaluate)
        else:
            evaluate()
            if self.options.clip > 0:
                self.optimizer.clip_grad_norm_(self.options.clip)
            self.optimizer.step()
        return shares[0]

    def _backward(self, step: int) -> Tensor:
        """Gradients of the global batch; returns this rank's share of its mean loss.

        Shares add up to the mean even where the batch cannot be dealt out evenly. What is taken of
        gradients is the mean over ranks, so each share goes in times their number.
        """
        options = self.options
        bytes_in, bytes_out = self.corpus.batch(
            step, seed=options.seed, size=options.batch, context=options.context, ranks=self.ranks
        )
        self.optimizer.zero_grad()
        share = summed_loss(self.replica(bytes_in), bytes_out) / (options.batch * options.context)
        (share * self.ranks.world_size).backward()
        return share.detach()

    @torch.no_grad()
    def _evaluate(self) -> None:
        bytes_in, bytes_out = self.corpus.held_out_part(self.options.context, self.ranks)
        loss = summed_loss(self.model(bytes_in), bytes_out).double()
        total, count = self.ranks.sum(torch.stack([loss, loss.new_tensor(bytes_out.numel())]))
        held_out = float(total / count)
        self.history.held_out.append((self.step, held_out))
        if self.options.scheduler == "plateau" and self.step > 0:
            self.scheduler.step(held_out)  # type: ignore[arg-type]  # a metric
        self.report.evaluated(self.history)

    # -- what is left behind -------------------------------------------------------------------

    def _save(self) -> Path:
        """Write the run, every rank its part; returns the directory of the step."""
        saved = checkpoint.save(
            self.options.save,
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            extra=extra_of(self.options, self.history, self.corpus.sha256),
            keep=self.options.keep or None,
        )
        return Path(self.options.save) / saved.name

    def _summarise(self) -> None:
        options = self.options
        by_rank = self.ranks.from_all(state_bytes(self.optimizer.optim))
        num_steps = self.step - self.first_step
        rate = num_steps * options.batch * options.context / max(self.seconds, 1e-9)
        first, last = self.history.held_out[0][1], self.history.held_out[-1][1]
        self.report.say(
            f"\ntrained {num_steps} steps in {self.seconds:.1f} s, {rate:,.0f} tokens/s"
            f"\nheld-out loss {first:.3f} -> {last:.3f} nats, {bits(first):.3f} -> {bits(last):.3f}"
            f" bits a byte\n\n{memory_table(by_rank, names(options))}\n"
        )
        if self.ranks.is_first:
            draw(Path(options.plot), self.history, f"{options.optimizer}, {self.ranks}")
            self.report.say(f"curves  {options.plot}")

    def _prove(self) -> str | None:
        """One more step, here and by plain ``torch.optim`` from the saved step, must be equal.

        It is not clipped: a norm added up over ranks differs from plain torch's by rounding, so
        it is compared by itself.
        """
        by_rank = self.ranks.from_all(state_bytes(self.optimizer.optim))
        with own_gradients(self.model) as own:
            self._backward(self.step)
        means = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        if self.options.gradients != "replicated":  # then .grad is this rank's own, or gone
            means = {name: self.ranks.mean(own[name]) for name in means}
        norm = float(self.optimizer.clip_grad_norm_(math.inf))
        one_evaluation(self.optimizer)
        wrong, rounding = None, rounding_of(self.options, self.ranks)
        again = partial(self._backward, self.step) if self._evaluates else None
        if not self.ranks.is_first:
            self.optimizer.step(again)
        else:
            model = new_model(self.options).to(self.ranks.device)
            assert self.saved is not None, "a run that has ended is saved"
            run = consolidated(self.saved)
            twin = Twin(run, model, self.options, chosen_kernels(self.optimizer))
            wrong = twin.step(means, norm)
            self.optimizer.step(again)
            wrong = wrong or twin.difference(self.model, sum(by_rank), rounding)
            self.report.say(f"saved   {self.saved}\n{verdict(self.options, wrong, rounding)}")
        return self.ranks.from_first(wrong)

    @property
    def _evaluates(self) -> bool:
        return OPTIMIZERS[self.options.optimizer].evaluates

    def _introduction(self) -> str:
        options = self.options
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        other = "; not the text the run began with" if self.reads_other_text else ""
        clipped = f"clipped to a norm of {options.clip:g}" if options.clip else "not clipped"
        begins = f"resumed after step {self.step}" if self.step else "a new run"
        return (
            f"text       {self.corpus}{other}\n"
            f"model      {options.size}, {parameters:,} parameters\n"
            f"optimizer  {names(options)}, lr {options.lr:g}, schedule {options.scheduler}\n"
            f"gradients  {options.gradients}, {clipped}\n"
            f"run        {begins}, {options.steps} steps in all, on {self.ranks}\n"
        )


def new_model(options: Options) -> GPT:
    """The model with the weights that the seed stands for."""
    size = SIZES[options.size]
    torch.manual_seed(options.seed)
    return GPT(
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        width=size.width,
        context=options.context,
        sparse=OPTIMIZERS[options.optimizer].takes == "embeddings",
    )


def _agree_on_start(given: Mapping[str, Any], ranks: Ranks) -> Start:
    """Where all ranks begin: the first one's options count, and a refusal of any."""
    given = ranks.from_first(dict(given))
    place = ranks.from_first(newest_step(given) if ranks.is_first else None)
    start = refusal = None
    try:
        start = prepare_run(given, place, ranks.world_size, ranks.process_group)
    except Refused as problem:
        refusal = str(problem)
    for text in ranks.from_all(refusal):
        if text is not None:
            raise Refused(text)
    assert start is not None
    return start


def _agree_on_corpus(options: Options, ranks: Ranks) -> Corpus:
    corpus = read_corpus()
    corpus.check_context(options.context)
    hashes = ranks.from_all(corpus.sha256)
    for rank, sha256 in enumerate(hashes):
        if sha256 != hashes[0]:
            raise Refused(
                f"expected the same text on every rank, got sha256 {hashes[0]} on rank 0 and"
                f" {sha256} on rank {rank}; run the same Python on every machine"
            )
    return corpus.to(ranks.device)
