"""Matrix optimizers on eight devices: their collectives, the bytes, and the same result."""

import devices
import pytest

PROGRAM = """
    import collections, json, re, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.sharding import NamedSharding, PartitionSpec as P
    import pgjax as pg
    from pgjax import optim

    case = sys.argv[1]
    rng = np.random.default_rng(0)
    KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")

    def computations(text):
        found, name = {}, None
        for line in text.splitlines():
            if line and not line[0].isspace() and line.rstrip().endswith("{"):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                found[name] = []
            elif name is not None:
                found[name].append(line)
        return found

    def collectives(lines):
        return [k for line in lines for k in KINDS if re.search(rf" {k}(-start)?\\(", line)]

    def sent(lines):  # bytes that one device sends to others
        total = 0
        for line in lines:
            found = re.search(r"= (.*?) all-to-all\\(", line)
            if found:
                parts = re.findall(r"(f32|bf16)\\[([\\d,]*)\\]", found[1])
                sizes = [{"f32": 4, "bf16": 2}[t] * np.prod([int(d) for d in s.split(",")])
                         for t, s in parts]
                pieces = sizes if len(sizes) > 1 else [sizes[0] / 8] * 8
                total += sum(pieces) * 7 / 8
        return total

    def leaves(shapes):
        return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}

    mesh = pg.parallel.make_mesh(sys.argv[2])
    if case == "sixteen":
        params = leaves({f"w{i}": (64, 128) for i in range(16)})
        specs = {k: P("fsdp", None) for k in params}
        axes = {k: optim.MatrixSpec((1,), (0,)) for k in params}
    elif case == "uneven":
        params = leaves({f"w{i}": (64, 128) for i in range(13)})
        specs = {k: P(None, "fsdp") for k in params}
        axes = {k: optim.MatrixSpec((1,), (0,)) for k in params}
    elif case == "layers":
        shapes = {"query": (64, 8, 16), "key": (64, 4, 16), "value": (64, 4, 16),
                  "output": (8, 16, 64), "gate": (64, 192), "up": (64, 192), "down": (192, 64)}
        params = leaves({k: (28, *s) for k, s in shapes.items()})
        last = {"output", "down"}
        specs = {k: P(*[None] * (len(params[k].shape) - 1), "fsdp") if k in last
                 else P(None, "fsdp") for k in params}
        axes = {k: optim.MatrixSpec((2, 3), (1,)) for k in ("query", "key", "value")}
        axes |= {"output": optim.MatrixSpec((3,), (1, 2))}
        axes |= {k: optim.MatrixSpec((2,), (1,)) for k in ("gate", "up", "down")}
    elif case == "experts":
        params = leaves({"gate": (3, 8, 16, 24), "down": (3, 8, 24, 16)})
        specs = {"gate": P(None, "expert", "fsdp"), "down": P(None, "expert", None, "fsdp")}
        axes = {k: optim.MatrixSpec((3,), (2,)) for k in params}
    elif case == "heads":
        params = leaves({"query": (4, 32, 8, 6)})
        specs = {"query": P(None, "fsdp", "tensor")}
        axes = {"query": optim.MatrixSpec((2, 3), (1,))}
    placed = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
    options = dict(alpha=1.0, shape="spectral", momentum=optim.momentum(0.9), specs=axes)
    oracle = optim.oracles.polar("ns")
    plain = optim.matrix_transform(oracle, **options)
    order = sys.argv[3]
    ours = optim.matrix_transform(
        oracle, order=order, **options, layout=optim.layout_of(placed))
    plain = optim.matrix_transform(oracle, order=order, **options)
    wanted, _ = jax.jit(plain.update)(params, plain.init(params))
    compiled = jax.jit(ours.update).lower(placed, ours.init(placed)).compile()
    got, _ = compiled(placed, ours.init(placed))
    parts = computations(compiled.as_text())
    bodies = re.findall(r"body=%?([\\w.\\-]+)", compiled.as_text())
    reached, todo = set(), list(bodies)
    while todo:  # what loops call, too
        name = todo.pop()
        if name in reached or name not in parts:
            continue
        reached.add(name)
        todo += re.findall(r"(?:calls|to_apply|body|condition)=%?([\\w.\\-]+)",
                           "\\n".join(parts[name]))
    everything = [line for lines in parts.values() for line in lines]
    inside = [line for name in reached for line in parts[name]]
    difference = max(
        float(jnp.abs(got[k] - wanted[k]).max() / jnp.abs(wanted[k]).max()) for k in got)
    print(json.dumps({
        "loops": len(bodies),
        "inside": len(collectives(inside)),
        "outside": dict(collections.Counter(collectives(everything))),
        "bytes": sent(everything),
        "difference": difference,
        "kept": all(got[k].sharding.is_equivalent_to(placed[k].sharding, got[k].ndim) for k in got),
    }))
"""


def measured(case, mesh, order="momentum_first"):
    return devices.run(PROGRAM, case, mesh, order)


@pytest.mark.parametrize(
    ("case", "groups", "matrices"),
    [
        ("sixteen", [(64, 128)], [16]),
        ("uneven", [(64, 128)], [16]),  # 13 and three of zeros
        ("layers", [(64, 192), (64, 128), (64, 64)], [88, 56, 56]),  # 84 + 4 of zeros
    ],
)
def test_one_resharding_each_way_and_none_in_the_iteration(case, groups, matrices):
    out = measured(case, "fsdp=8")
    assert out["loops"] == len(groups) and out["inside"] == 0
    assert out["outside"] == {"all-to-all": 2 * len(groups)}
    # There and back, each device sends 7/8 of its eighth of every matrix.
    numbers = sum(count * m * n for count, (m, n) in zip(matrices, groups, strict=True))
    assert out["bytes"] == pytest.approx(2 * 4 * numbers * 7 / 64)
    assert out["difference"] < 1e-5 and out["kept"]


def test_experts_stay_on_their_devices():
    out = measured("experts", "expert=4,fsdp=2")
    assert out["inside"] == 0 and out["difference"] < 1e-5 and out["kept"]
    assert set(out["outside"]) <= {"all-to-all"}


def test_matrices_split_both_ways():
    out = measured("heads", "fsdp=2,tensor=4")
    assert out["inside"] == 0 and out["difference"] < 1e-5 and out["kept"]


def test_momentum_behind_the_oracle_needs_one_more_number_a_matrix():
    out = measured("sixteen", "fsdp=8", "oracle_first")
    assert out["inside"] == 0 and out["outside"]["all-to-all"] == 2
    assert out["difference"] < 1e-5 and out["kept"]
