"""A run from start to end, resumable at any point."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from experiments.random_calculation import build, placement, report
from experiments.random_calculation.config import Config, next_run
from experiments.shared import runs
from pgjax.tasks import random_calculation as task
from pgjax.train import evaluation, text


class Run:
    """One run: everything that does not change from step to step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        runs.join(config)
        # What can be wrong with a command line is said before anything is made.
        self.objective = build.make_objective(config)
        self.mesh, self.sampling_mesh = placement.meshes(config)
        if config.warmup_from is not None:
            warmed_up = config.warmup_from / "checkpoints" / "warmed_up"
            if not warmed_up.is_dir():
                raise FileNotFoundError(f"warmup_from: no warmed-up model in {warmed_up}")
        self.directory = config.out or next_run()
        runs.claim(self.directory, config)
        self.decoder, self.params = build.make_decoder(config, self.mesh)
        # Who comes first builds what is not there yet.
        self.sources = pg.parallel.first_then_others(
            lambda: {
                split: task.data_source(config.data_preset, split, data_dir=config.data_dir)
                for split in ("train", "validation", "test")
            }
        )
        self.prompt_length = build.prompt_length(config)
        self.max_new_tokens = build.max_new_tokens(config)
        axes: dict[str, Any] = {"decoder": self.decoder.logical_axes()}
        if "value_head" in self.params:
            axes["value_head"] = pg.models.value_head_logical_axes()
        self.shardings = pg.parallel.shardings(axes, self.mesh, shapes=self.params)
        first = pg.parallel.is_first()
        self.writer = (
            pg.train.metrics.MetricsWriter(self.directory, wandb=config.wandb) if first else None
        )

    def place(self, batch: Any) -> Any:
        """Spreads the rows of a batch over the mesh."""
        return pg.parallel.place_rows(batch, self.mesh)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def fit(
        self,
        phase: str,
        state: pg.train.TrainState,
        step: text.Step,
        batches: Any,
        num_steps: int,
        **options: Any,
    ) -> pg.train.TrainState:
        """Runs a phase to its end, from its newest checkpoint where there is one."""
        with pg.train.checkpoints.open(
            self.directory / "checkpoints" / phase,
            keep_last=2,
            keep_best=1,
            best_metric="accuracy",
        ) as saved:
            if saved.latest_step() is not None:
                state, metadata = saved.restore(like=state)
                batches.set_state(metadata["batches"])
            if self.writer is not None:
                self.writer.truncate_after(int(state.step), phase=phase, phases=("warmup", "rl"))
            state = pg.train.fit(
                step,
                state,
                batches,
                num_steps=num_steps,
                phase=phase,
                writer=self.writer,
                checkpoints=saved,
                checkpoint_every=self.config.checkpoint_every,
                metadata={"config": json.loads((self.directory / "config.json").read_text())},
                **options,
            )
        return state

    def warm_up(self) -> Any:
        """Parameters after the supervised phase."""
        config = self.config
        optimizer = build.make_warmup_optimizer(config)
        task_config = task.PRESETS[config.data_preset]
        length = max(
            task.prompt_length_bound(task_config, n) + task.response_length_bound(task_config, n)
            for n in config.warmup.levels
        )
        params = pg.parallel.shard(self.params["decoder"], self.shardings["decoder"])
        state = pg.train.init({"decoder": params}, optimizer, jax.random.key(config.seed))
        update = pg.train.make_update(
            pg.train.language_model_outputs(self.decoder),
            pg.objectives.supervised(),
            optimizer,
            num_microbatches=config.warmup.microbatches,
            widths=build.widths(length),
            state_shardings=pg.train.shardings(state),
        )
        update = pg.train.keep_skipped(update, runs.skipped(self.directory, "warmup"))
        own = runs.share(self.mesh, "warmup.batch_size", config.warmup.batch_size)
        batches = pg.tasks.sft_loader(
            self.sources["train"],
            length=length,
            batch_size=own.rows,
            worked_probability=config.warmup.worked_probability,
            levels=config.warmup.levels,
            seed=config.seed,
            shard_index=own.part,
            shard_count=own.parts,
        )

        def step(state: pg.train.TrainState, batch: Any) -> Any:
            given = self.place({name: batch[name] for name in ("tokens", "mask")})
            state, metrics = update(state, pg.train.demonstrations(given["tokens"], given["mask"]))
            names = ("loss", "gradient_norm", "entropy", "skipped_updates")
            shown = {name: metrics[name] for name in names}
            return state, {**shown, "tokens": given["mask"].sum()}

        state = self.fit(
            "warmup",
            state,
            step,
            batches,
            config.warmup.steps,
            progress_fields=("loss", "entropy", "tokens/s"),
        )
        return state.params["decoder"]

    def evaluate(self, split: str, per_level: int, params: Any, *, greedy: bool = False) -> Any:
        """Accuracy by level of the decoder's parameters."""
        batches = build.evaluation_batches(
            self.sources[split], self.config.evaluation.levels, per_level, self.prompt_length
        )
        samples = 1 if greedy else self.config.evaluation.samples
        graded = evaluation.evaluate_text(
            self.decoder,
            params,
            batches,
            lambda samples: task.parse_answer(samples.tokens, samples.mask),
            jax.random.key(self.config.seed + 1),
            num_samples=samples,
            max_new_tokens=self.max_new_tokens,
            stop_tokens=(task.EOS,),
            temperature=0.0 if greedy else 1.0,
        )
        return evaluation.accuracy_by_level(graded, k=samples)

    def test(self, name: str, params: Any) -> dict[int, evaluation.Accuracy]:
        """Test accuracy, measured once and kept in the run's directory."""
        count = self.config.evaluation.test_prompts

        def measure() -> dict[str, Any]:
            sampled = self.evaluate("test", count, params)
            greedy = self.evaluate("test", count, params, greedy=True)
            return {
                "sampled": {n: a._asdict() for n, a in sampled.items()},
                "greedy": {n: a._asdict() for n, a in greedy.items()},
            }

        stored = runs.measured_once(self.directory / f"test_{name}.json", measure)
        return {int(n): evaluation.Accuracy(**a) for n, a in stored["sampled"].items()}

    def reinforce(self, initial: Any) -> Any:
        """Parameters after the policy-gradient phase."""
        config, rl = self.config, self.config.rl
        optimizer = build.make_optimizer(config, self.shardings)
        # The update donates its state, so the learner gets a copy; the reference stays as it is.
        reference = {"decoder": initial}
        params = {**self.params, "decoder": jax.tree.map(jnp.copy, initial)}
        params = pg.parallel.shard(params, self.shardings)
        state = pg.train.init(
            params, optimizer, jax.random.key(config.seed), objective=self.objective
        )
        update = pg.train.make_update(
            pg.train.language_model_outputs(self.decoder, temperature=rl.temperature),
            self.objective,
            optimizer,
            num_epochs=rl.epochs,
            num_minibatches=rl.minibatches,
            num_microbatches=rl.microbatches,
            widths=build.widths(self.prompt_length + self.max_new_tokens),
            group_size=rl.samples if self.objective.whole_groups else None,
            state_shardings=pg.train.shardings(state),
        )
        update = pg.train.keep_skipped(update, runs.skipped(self.directory, "rl"))
        shown: list[str] = []

        def show(at: int, samples: Any, rewards: Any) -> None:
            if config.show_every and at % config.show_every == 0:
                shown[:] = completions(*pg.parallel.fetch((samples, rewards)), count=4)

        own = runs.share(self.mesh, "rl.prompts", rl.prompts)
        batches: Any = pg.tasks.prompts_loader(
            self.sources["train"],
            prompt_length=self.prompt_length,
            num_prompts=own.rows,
            levels=rl.levels,
            seed=config.seed,
            shard_index=own.part,
            shard_count=own.parts,
        )
        sampling: dict[str, Any] = {
            "num_samples": rl.samples,
            "max_new_tokens": self.max_new_tokens,
            "stop_tokens": (task.EOS,),
            "temperature": rl.temperature,
            "extras": build.answers,
            "on_samples": show,
        }
        begun: Any = state
        step: Any
        with contextlib.ExitStack() as stack:
            if self.sampling_mesh is None:
                inner = text.make_text_step(
                    self.decoder,
                    update,
                    build.make_reward(config, self.decoder, reference),
                    reference_params=reference,
                    **sampling,
                )

                def step(state: Any, batch: Any) -> Any:
                    return inner(state, self.place(batch))

            else:
                split = placement.split_step(
                    config, self.decoder, self.mesh, self.sampling_mesh, update, reference, sampling
                )
                step = stack.enter_context(split)
                begun, batches = split.init(state), pg.train.Lookahead(batches, split.staleness)
            return self.learn(begun, step, batches, shown)

    def learn(self, state: Any, step: Any, batches: Any, shown: list[str]) -> Any:
        """The decoder's parameters after the steps of reinforcement."""
        config = self.config

        def validate(state: Any) -> dict[str, float]:
            count = config.evaluation.validation_prompts
            levels = self.evaluate("validation", count, state.params["decoder"])
            metrics = {f"accuracy/level {n}": a.average for n, a in levels.items()}
            metrics |= {f"length/level {n}": a.length for n, a in levels.items()}
            return {**metrics, "accuracy": float(np.mean([a.average for a in levels.values()]))}

        def pop_shown(at: int, state: Any) -> str | None:
            text, shown[:] = "\n".join(shown), []
            return text or None

        state = self.fit(
            "rl",
            state,
            step,
            batches,
            config.rl.steps,
            evaluate=validate,
            evaluate_every=config.evaluation.every,
            progress_fields=("reward", "approx_kl", "entropy", "tokens/s"),
            on_step=pop_shown,
            profile=runs.profile(self.directory, config.profile),
        )
        return state.params["decoder"]


def completions(samples: Any, rewards: Any, *, count: int) -> list[str]:
    """Sampled completions as text, one of each of the first prompts."""
    tokens, mask = samples.tokens, samples.mask
    lines = []
    for prompt in range(count):
        rows = np.flatnonzero(samples.prompt_ids == prompt)
        if not len(rows):
            break
        row = rows[0]
        start = int(mask[row].argmax())
        end = start + int(mask[row].sum())
        response = task.decode([t for t in tokens[row, start:end] if t != task.EOS])
        mark = "✓" if float(rewards[row]) > 0.5 else "✗"
        lines.append(f"  {mark} {task.decode(tokens[row, :start])} {response}")
    return lines


def run(config: Config) -> report.Result | None:
    """Warm-up, test, reinforcement, test; resumable at any point.

    In a job of several processes the first has the result.
    """
    started = time.perf_counter()
    this = Run(config)
    warmed = warmed_up(this)
    before = this.test("before", warmed)
    trained = this.reinforce(warmed)
    after = this.test(f"after_{config.rl.steps}", trained)
    this.close()
    if not pg.parallel.is_first():
        return None
    records = pg.train.metrics.read_metrics(this.directory)
    # Steps of earlier sittings of a resumed run count too; the total is this sitting's.
    seconds = {
        phase: sum(r["seconds"] for r in records if r["phase"] == phase)
        for phase in ("warmup", "rl")
    }
    seconds["total"] = time.perf_counter() - started
    speed = float(np.median([r["tokens/s"] for r in records if r["phase"] == "rl"]))
    shares = runs.time_shares(records, "rl")
    result = report.Result(this.directory, before, after, seconds, speed, shares)
    report.write_report(config, result)
    return result


def warmed_up(this: Run) -> Any:
    """The decoder's parameters after the warm-up: this run's, or another's that it starts from."""
    like = pg.parallel.shard(this.params["decoder"], this.shardings["decoder"])
    source = this.config.warmup_from
    if source is not None:
        with pg.train.checkpoints.open_readonly(source / "checkpoints" / "warmed_up") as saved:
            return saved.restore(like=like)[0]
    with pg.train.checkpoints.open(this.directory / "checkpoints" / "warmed_up") as saved:
        if saved.latest_step() is not None:
            return saved.restore(like=like)[0]
        params = this.warm_up()
        saved.save(this.config.warmup.steps, params)
        return params
