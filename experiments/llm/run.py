"""A run from a checkpoint to a better one, resumable at any point."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import pgjax as pg
from experiments.llm import build, evaluate, problems, report
from experiments.llm.config import GRPO_RUNS, SFT_RUNS, Common, GRPOConfig, SFTConfig
from experiments.shared import objectives, runs
from pgjax.rewards import math_answers
from pgjax.tasks import chat
from pgjax.train import evaluation, text


class Run:
    """Everything that does not change from step to step."""

    def __init__(
        self,
        config: GRPOConfig | SFTConfig,
        root: pathlib.Path,
        verifier: math_answers.MathVerifier,
        *,
        with_values: bool,
    ) -> None:
        self.config, self.verifier = config, verifier
        runs.join(config)
        self.mesh = pg.parallel.make_mesh(config.mesh)
        # What can be wrong with the model or the data is found before a directory is made.
        self.policy = build.load_policy(config, config.tuning, self.mesh, with_values=with_values)
        if isinstance(config, GRPOConfig) and config.rl.routing_replay != "none":
            build.check_mixture(self.policy.decoder)
        self.encode = problems.encoder(config.data, self.policy.tokenizer)
        parts = problems.load(config.data, config.task, config.test_task, config.seed)
        self.parts = problems.Parts(
            *(
                pg.tasks.text_problems.within_length(
                    part, self.encode, max_length=max(config.data.prompt_lengths), long="drop"
                )
                for part in (parts.train, parts.validation, parts.test)
            )
        )
        self.directory = config.out or runs.next_run(root)
        runs.claim(self.directory, config)
        first = pg.parallel.is_first()
        self.writer = (
            pg.train.metrics.MetricsWriter(self.directory, wandb=config.wandb) if first else None
        )

    def place(self, batch: Any) -> Any:
        """Spreads the rows of a batch over the mesh."""
        return pg.parallel.place_rows(batch, self.mesh)

    def fit(
        self, phase: str, state: pg.train.TrainState, step: text.Step, batches: Any, steps: int,
        **options: Any,
    ) -> pg.train.TrainState:  # fmt: skip
        """Runs to the end, from the newest checkpoint where there is one."""
        with pg.train.checkpoints.open(
            self.directory / "checkpoints", keep_last=2, keep_best=1, best_metric="accuracy"
        ) as saved:
            if saved.latest_step() is not None:
                state, metadata = saved.restore(like=state)
                batches.set_state(metadata["batches"])
            if self.writer is not None:
                self.writer.truncate_after(int(state.step), phase=phase, phases=(phase,))
            return pg.train.fit(
                step,
                state,
                batches,
                num_steps=steps,
                phase=phase,
                writer=self.writer,
                checkpoints=saved,
                checkpoint_every=self.config.checkpoint_every,
                metadata={"config": json.loads((self.directory / "config.json").read_text())},
                profile=runs.profile(self.directory, self.config.profile),
                evaluate=self.validate,
                evaluate_every=self.config.evaluation.every,
                **options,
            )

    def judged(self, part: pg.tasks.text_problems.Problems, params: Any, count: int) -> Any:
        """Accuracy of whole parameters on the first problems of a part."""
        settings = self.config.evaluation
        batches = problems.evaluation_batches(
            part, self.config.data, self.encode, self.policy.pad, count=count, batch=settings.batch
        )
        answers = evaluate.graded(
            self.policy, params, batches, self.verifier, settings, self.config.seed + 1
        )
        return evaluate.overall(answers)

    def validate(self, state: pg.train.TrainState) -> dict[str, float]:
        count = self.config.evaluation.validation_prompts
        accuracy = self.judged(self.parts.validation, self.policy.whole(state.params), count)
        return {
            "accuracy": accuracy.average,
            "pass_at_k": accuracy.pass_at_k,
            "majority_at_k": accuracy.majority_at_k,
            "length": accuracy.length,
        }

    def test(self, name: str, params: Any) -> evaluation.Accuracy:
        """Test accuracy, measured once and kept in the run's directory."""
        count = self.config.evaluation.test_prompts
        stored = runs.measured_once(
            self.directory / f"test_{name}.json",
            lambda: self.judged(self.parts.test, params, count)._asdict(),
        )
        return evaluation.Accuracy(**stored)

    def finish(
        self, before: evaluation.Accuracy, state: pg.train.TrainState, phase: str, seconds: float
    ) -> report.Result | None:
        """Tests, exports and reports; the result is the first process's."""
        trained = state.params
        after = self.test(f"after_{int(state.step)}", self.policy.whole(trained))
        if self.config.export:
            build.export(self.config, self.policy, trained, self.directory)
        if self.writer is None:
            return None
        self.writer.close()
        records = pg.train.metrics.read_metrics(self.directory)
        result = report.Result(
            directory=self.directory,
            before=before,
            after=after,
            seconds=seconds,
            tokens_per_second=float(
                np.median([r["tokens/s"] for r in records if r["phase"] == phase])
            ),
            time_shares=runs.time_shares(records, phase),
        )
        report.write_report(self.config, result, phase)
        return result


def reinforce(config: GRPOConfig) -> report.Result | None:
    """Test, policy gradient, test, export."""
    started = time.perf_counter()
    rl, tuning = config.rl, config.tuning
    objective = objectives.make_objective(
        config.objective,
        config.objective_options,
        aggregate=config.aggregate,
        known={
            "length": rl.max_new_tokens,
            "max_length": rl.max_new_tokens,
            "length_reference": rl.max_new_tokens,
            "group_size": rl.samples,
            "steps": rl.steps,
            "learning_rate": tuning.learning_rate,
        },
    )
    with math_answers.MathVerifier(workers=config.verifier_workers) as verifier:
        run = Run(config, GRPO_RUNS, verifier, with_values="values" in objective.needs)
        policy = run.policy
        before = run.test("before", policy.whole(policy.trainable))
        reference = build.reference_of(policy, "reference_logprobs" in objective.needs)
        optimizer = build.make_optimizer(tuning, policy.trainable)
        state = pg.train.init(
            policy.trainable, optimizer, jax.random.key(config.seed), objective=objective
        )
        update = pg.train.make_update(
            pg.train.language_model_outputs(
                policy.decoder, temperature=rl.temperature, packed_shares=tuning.packed
            ),
            objective,
            optimizer,
            num_epochs=rl.epochs,
            num_minibatches=rl.minibatches,
            num_microbatches=tuning.microbatches,
            group_size=rl.samples if objective.whole_groups else None,
            state_shardings=pg.train.shardings(state),
        )
        update = pg.train.keep_skipped(update, runs.skipped(run.directory, "rl"))
        shown = _Completions(policy, config.show_every)
        train = run.parts.train
        inner = text.make_text_step(
            policy.decoder,
            update,
            math_answers.batch_reward(
                verifier,
                lambda ids: chat.decode(policy.tokenizer, ids),
                lambda batch: [train[int(i)]["answer"] for i in np.asarray(batch["ids"])],
            ),
            num_samples=rl.samples,
            max_new_tokens=rl.max_new_tokens,
            stop_tokens=policy.stop_tokens,
            temperature=rl.temperature,
            reference_params=reference,
            frozen=policy.frozen,
            generate=build.sampler(rl),
            prepare=jax.jit(functools.partial(pg.train.record_experts, policy.decoder))
            if rl.routing_replay == "learner"
            else None,
            extras=(lambda samples, batch: {"answer_ids": _answer_ids(policy, samples)})
            if config.objective == "copo"
            else None,
            on_samples=shown.keep,
        )

        def step(state: pg.train.TrainState, batch: Any) -> Any:
            return inner(state, run.place(batch))

        own = runs.share(run.mesh, "rl.prompts", rl.prompts)
        batches = pg.tasks.prompts_loader(
            train,
            prompt_length=config.data.prompt_lengths,
            num_prompts=own.rows,
            seed=config.seed,
            encode=run.encode,
            pad=policy.pad,
            shard_index=own.part,
            shard_count=own.parts,
        )
        state = run.fit(
            "rl",
            state,
            step,
            batches,
            rl.steps,
            progress_fields=("reward", "approx_kl", "entropy", "tokens/s"),
            on_step=shown.pop,
        )
        return run.finish(before, state, "rl", time.perf_counter() - started)


def fine_tune(config: SFTConfig) -> report.Result | None:
    """Test, maximum likelihood, test, export."""
    started = time.perf_counter()
    tuning = config.tuning
    with math_answers.MathVerifier(workers=config.verifier_workers) as verifier:
        run = Run(config, SFT_RUNS, verifier, with_values=False)
        policy = run.policy
        own = runs.share(run.mesh, "batch_size", config.batch_size)
        batches, too_long = problems.demonstrations(
            run.parts.train,
            config.data,
            policy.tokenizer,
            policy.pad,
            lengths=config.lengths,
            batch_size=own.rows,
            seed=config.seed,
            shard_index=own.part,
            shard_count=own.parts,
        )
        if too_long:
            print(f"left out {too_long} conversations of more than {max(config.lengths)} tokens")
        before = run.test("before", policy.whole(policy.trainable))
        optimizer = build.make_optimizer(tuning, policy.trainable)
        state = pg.train.init(policy.trainable, optimizer, jax.random.key(config.seed))
        update = pg.train.make_update(
            pg.train.language_model_outputs(policy.decoder, packed_shares=tuning.packed),
            pg.objectives.supervised(),
            optimizer,
            num_microbatches=tuning.microbatches,
            state_shardings=pg.train.shardings(state),
        )
        update = pg.train.keep_skipped(update, runs.skipped(run.directory, "sft"))

        def step(state: pg.train.TrainState, batch: Any) -> Any:
            given = run.place({name: batch[name] for name in ("tokens", "mask")})
            rollout = pg.train.demonstrations(given["tokens"], given["mask"])
            state, metrics = update(state, rollout, None, policy.frozen)
            names = ("loss", "gradient_norm", "entropy", "skipped_updates")
            shown = {name: metrics[name] for name in names}
            return state, {**shown, "tokens": given["mask"].sum()}

        state = run.fit(
            "sft",
            state,
            step,
            batches,
            config.steps,
            progress_fields=("loss", "gradient_norm", "tokens/s"),
        )
        return run.finish(before, state, "sft", time.perf_counter() - started)


def _answer_ids(policy: build.Policy, samples: Any) -> Any:
    # A prompt's completions are all in one process, and only they are compared.
    (tokens, mask), _ = pg.parallel.own_rows((samples.tokens, samples.mask))
    rows = zip(tokens, mask, strict=True)
    texts = [chat.decode(policy.tokenizer, row[kept].tolist()) for row, kept in rows]
    return pg.parallel.rows_of_all(math_answers.answer_ids(texts), samples.tokens)


@dataclasses.dataclass
class _Completions:
    """Some completions of a step, for the eyes of whoever watches."""

    policy: build.Policy
    every: int
    lines: list[str] = dataclasses.field(default_factory=list)

    def keep(self, step: int, samples: Any, rewards: Any) -> None:
        if not self.every or step % self.every:
            return
        shown = (samples.tokens, samples.mask, samples.prompt_ids, rewards)
        tokens, mask, prompts, rewards = pg.parallel.fetch(shown)
        for row in np.unique(prompts, return_index=True)[1][:2]:
            mark = "✓" if float(rewards[row]) > 0.5 else "✗"
            answer = chat.decode(self.policy.tokenizer, tokens[row][mask[row]].tolist())
            self.lines.append(f"  {mark} {answer!r:.300}")

    def pop(self, step: int, state: pg.train.TrainState) -> str | None:
        del step, state
        lines, self.lines = self.lines, []
        return "\n".join(lines) or None


def main(
    program: str,
    parse: Callable[[list[str]], Common],
    work: Callable[[Any], report.Result | None],
    arguments: list[str],
) -> int:
    """Parses, works and reports; what is wrong with the input is one line and exit status 2."""
    import sys

    settings: Any = None
    try:
        settings = parse(arguments)
        result = work(settings)
    except pg.train.Interrupted as stop:
        where = "" if settings.out is None else f" --out {settings.out}"
        print(f"\n{stop}. Continue with:\n  python -m experiments.{program} --resume{where}")
        return 128 + stop.signal_number
    except pg.train.NonFinite as stuck:
        root = GRPO_RUNS if program == "grpo_llm" else SFT_RUNS
        return runs.explain(stuck, program=program, out=settings.out, root=root)
    except runs.USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is not None:
        report.print_report(settings, result)
    return 0
