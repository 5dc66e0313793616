"""Table, verdict, figure and file of a plan."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import pgjax as pg
from experiments.planning.sizes import ACCELERATORS
from experiments.shared import runs

NAMES = {"update": "training step", "decode": "decoding step"}
COLOURS = {
    "parameters": "#1f4e79",
    "optimizer": "#5b8db8",
    "cache": "#8e6bbf",
    "batch": "#9aa5b1",
    "temporary": "#e0a458",
    "outputs": "#7aa874",
}


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3f}" if nbytes < 1e8 else f"{nbytes / 1e9:.2f}"


def report(config: Any, found: Mapping[str, Any]) -> None:
    """Prints what was found; writes `plan.json` and `plan.png` to the plan's own directory."""
    import rich

    accelerator = ACCELERATORS[config.device]
    programs = {name: found[name] for name in NAMES if name in found}
    rows = []
    for name, facts in programs.items():
        lines = {**facts["memory"], "held in all": facts["total"]}
        lines |= {f"sent by {kind}": facts["sent"][kind] for kind in sorted(facts["sent"])}
        rows += [
            {"program": NAMES[name], "what": what, "GB": gigabytes(nbytes)}
            for what, nbytes in lines.items()
        ]
    title = (
        f"{config.model}, {found['parameters'] / 1e9:.2f}e9 parameters "
        f"({found['active'] / 1e9:.2f}e9 active), on {found['devices']} x {config.device} "
        f"({config.mesh}): one device"
    )
    rich.print(pg.train.metrics.summary_table(rows, title=title))
    for name, facts in programs.items():
        flops = found[f"{name}_flops"] / found["devices"]
        fits = facts["total"] <= accelerator.memory
        rich.print(
            f"{NAMES[name]}: {'fits' if fits else 'DOES NOT FIT'}, "
            f"{gigabytes(facts['total'])} of {accelerator.memory / 1e9:.0f} GB; "
            f"{flops / 1e12:.3g} TFLOPs a device, {1e3 * flops / accelerator.flops:.3g} ms at its "
            f"peak; compiled in {facts['seconds']:.0f} s"
            + ("" if facts["exact"] else "; loops of unknown length counted once")
        )
    if "decode" in programs and found["prompts"] % found["row_ways"]:
        rich.print(
            f"{found['prompts']} prompts are no equal parts for {found['row_ways']} devices: each "
            "holds the cache of all of them while decoding; "
            f"--rows {found['row_ways'] * config.samples} is one for each"
        )
    where = config.out / f"{pathlib.Path(config.model).name}_{config.mesh.replace(',', '_')}"
    where.mkdir(parents=True, exist_ok=True)
    runs.write_json(where / "plan.json", {"config": dataclasses.asdict(config), **found})
    _plot(where / "plan.png", programs, accelerator.memory, title)
    rich.print(f"  {where / 'plan.json'}\n  {where / 'plan.png'}")


def _plot(path: pathlib.Path, programs: Mapping[str, Any], memory: float, title: str) -> None:
    """What a device holds, a bar for each program, and what it sends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.7 * len(programs)))
    figure.set_layout_engine("constrained")
    held, sent = figure.subplots(1, 2, width_ratios=(3, 2))
    kinds = sorted({kind for facts in programs.values() for kind in facts["sent"]})
    for row, facts in enumerate(programs.values()):
        left = 0.0
        for what, nbytes in facts["memory"].items():
            held.barh(row, nbytes / 1e9, left=left, color=COLOURS[what], height=0.55)
            left += nbytes / 1e9
        left = 0.0
        for kind in kinds:
            width = facts["sent"].get(kind, 0.0) / 1e9
            sent.barh(row, width, left=left, height=0.55, color=f"C{kinds.index(kind)}")
            left += width
    held.axvline(memory / 1e9, color="#b03a2e", linewidth=1.2)
    for axis, label in ((held, "GB held"), (sent, "GB sent a step")):
        axis.set_yticks(range(len(programs)), [NAMES[name] for name in programs], fontsize=9)
        axis.set_xlabel(label, fontsize=9)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
    sent.set_yticks([])
    shown = {what for facts in programs.values() for what in facts["memory"]}
    bars = [held.barh(0, 0, color=colour) for what, colour in COLOURS.items() if what in shown]
    held.legend(bars, [w for w in COLOURS if w in shown], fontsize=7.5, ncols=3, loc="best")
    marks = [sent.barh(0, 0, color=f"C{k}") for k in range(len(kinds))]
    sent.legend(marks, kinds, fontsize=7.5, loc="best")
    figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, dpi=160)
