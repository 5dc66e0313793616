import itertools

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pgjax import returns
from pgjax.returns import recurrence

# ------------------------------------------------------------------ definitions, as explicit sums


def record_end(truncated, t):
    """Index of the last step recorded in one piece with step t."""
    while t + 1 < len(truncated) and not truncated[t]:
        t += 1
    return t


def per_row(row_function):
    """Lifts a function of one unmasked row to `[..., T]` with a mask, by cutting columns out."""

    def lifted(data, **options):
        shape = data["rewards"].shape
        out = np.zeros(shape)
        for index in np.ndindex(shape[:-1]):
            keep = data["mask"][index]
            row = {k: x[index][keep] for k, x in data.items() if k != "mask"}
            with_time = {k: x[index][keep] for k, x in options.items() if np.ndim(x)}
            out[index][keep] = row_function(row, **{**options, **with_time})
        return out

    return lifted


@per_row
def n_step_by_sums(d, n):
    r, g, v = d["rewards"], d["discounts"], d["next_values"]
    out = []
    for t in range(len(r)):
        end = min(t + n - 1, record_end(d["truncated"], t))
        total = sum(np.prod(g[t:k]) * r[k] for k in range(t, end + 1))
        out.append(total + np.prod(g[t : end + 1]) * v[end])
    return out


def discounted_by_sums(data):
    return n_step_by_sums(data, n=data["rewards"].shape[-1])


@per_row
def lambda_returns_by_mixture(d, lambda_):
    """The forward view: n-step returns weighed by the chance that the trace stops there."""
    r, g, v = d["rewards"], d["discounts"], d["next_values"]
    lam = np.broadcast_to(lambda_, r.shape)
    out = []
    for t in range(len(r)):
        end, total = record_end(d["truncated"], t), 0.0
        for stop in range(t, end + 1):
            g_n = sum(np.prod(g[t:k]) * r[k] for k in range(t, stop + 1))
            g_n += np.prod(g[t : stop + 1]) * v[stop]
            weight = np.prod(lam[t:stop]) * (1.0 if stop == end else 1 - lam[stop])
            total += weight * g_n
        out.append(total)
    return out


def summed_errors(d, delta, weight):
    """Σ_k weight(t, k) δ_k over the rest of the record, for each t."""
    return np.array(
        [
            sum(weight(t, k) * delta[k] for k in range(t, record_end(d["truncated"], t) + 1))
            for t in range(len(delta))
        ]
    )


@per_row
def gae_by_sums(d, lambda_):
    delta = d["rewards"] + d["discounts"] * d["next_values"] - d["values"]
    a = d["discounts"] * lambda_
    return summed_errors(d, delta, lambda t, k: np.prod(a[t:k]))


def v_trace_row(d, lambda_, rho_bar, c_bar):
    rho = np.minimum(rho_bar, d["ratios"])
    c = lambda_ * np.minimum(c_bar, d["ratios"])
    delta = rho * (d["rewards"] + d["discounts"] * d["next_values"] - d["values"])
    a = d["discounts"] * c
    targets = d["values"] + summed_errors(d, delta, lambda t, k: np.prod(a[t:k]))
    advantages = []
    for t in range(len(rho)):
        following = d["next_values"][t]
        if t < record_end(d["truncated"], t):
            following = following + targets[t + 1] - d["values"][t + 1]
        q = d["rewards"][t] + d["discounts"][t] * following
        advantages.append(rho[t] * (q - d["values"][t]))
    return targets, advantages


v_trace_targets_by_sums = per_row(lambda d, **options: v_trace_row(d, **options)[0])
v_trace_advantages_by_sums = per_row(lambda d, **options: v_trace_row(d, **options)[1])


@per_row
def retrace_by_sums(d, lambda_):
    c = lambda_ * np.minimum(1, d["ratios"])
    g, q = d["discounts"], d["values"]
    delta = d["rewards"] + g * d["next_values"] - q
    return q + summed_errors(d, delta, lambda t, k: np.prod(g[t:k]) * np.prod(c[t + 1 : k + 1]))


def by_loop(a, b, initial, reverse):
    x, out = initial, np.zeros_like(b)
    steps = range(b.shape[-1])
    for t in reversed(steps) if reverse else steps:
        x = a[..., t] * x + b[..., t]
        out[..., t] = x
    return out


# ---------------------------------------------------------------------------------------- helpers


def make(seed=0, shape=(3, 11), masked=0.3):
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=shape) >= masked
    return {
        "rewards": rng.normal(size=shape),
        "values": rng.normal(size=shape),
        "next_values": rng.normal(size=shape),
        "discounts": rng.uniform(0.5, 1, shape) * (rng.uniform(size=shape) > 0.15),
        "ratios": np.exp(rng.normal(size=shape)),
        "truncated": rng.uniform(size=shape) < 0.2,
        "mask": mask,
    }


def call(name, d, **options):
    """Calls the function under test with what it needs of the data."""
    time = {"truncated": d["truncated"], "mask": d["mask"], **options}
    r, v, v_next, g, w = (d[k] for k in ("rewards", "values", "next_values", "discounts", "ratios"))
    if name == "discounted":
        return returns.discounted(r, g, next_values=v_next, **time)
    if name in ("n_step", "lambda_returns"):
        return getattr(returns, name)(r, v_next, g, **time)
    if name == "gae":
        return returns.gae(r, v, v_next, g, **time)
    if name == "retrace":
        return returns.retrace(r, v, v_next, g, w, **time)
    return getattr(returns.v_trace(r, v, v_next, g, w, **time), name.removeprefix("v_trace."))


BARS = {"rho_bar": 1.7, "c_bar": 0.9}
CASES = {
    "discounted": ({}, discounted_by_sums),
    "n_step": ({"n": 3}, n_step_by_sums),
    "lambda_returns": ({"lambda_": 0.8}, lambda_returns_by_mixture),
    "gae": ({"lambda_": 0.8}, gae_by_sums),
    "v_trace.targets": ({"lambda_": 0.8, **BARS}, v_trace_targets_by_sums),
    "v_trace.advantages": ({"lambda_": 0.8, **BARS}, v_trace_advantages_by_sums),
    "retrace": ({"lambda_": 0.8}, retrace_by_sums),
}
every_case = pytest.mark.parametrize("name", CASES)
close64 = {"rtol": 1e-10, "atol": 1e-12}
close32 = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# -------------------------------------------------------------------------------------- recurrence


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 33)])
def test_both_recurrences_are_the_loop(x64, shape, reverse):
    rng = np.random.default_rng(len(shape))
    a, b, initial = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=shape[:-1])
    for start in (None, 0.7, initial):
        expected = by_loop(a, b, np.zeros(shape[:-1]) if start is None else start, reverse)
        for f in (returns.linear_recurrence, returns.linear_recurrence_sequential):
            got = jax.jit(f, static_argnames="reverse")(a, b, initial=start, reverse=reverse)
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, expected, **close64)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 13])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_merged_neighbours_are_the_loop(x64, steps, rounds):
    rng = np.random.default_rng(steps)
    a, b, start = rng.normal(size=(2, steps)), rng.normal(size=(2, steps)), rng.normal(size=2)
    got = jax.jit(recurrence._halved, static_argnums=3)(a, b, start, rounds)
    np.testing.assert_allclose(got, by_loop(a, b, start, True), **close64)


@pytest.mark.parametrize("shape", [(4, 8), (4, 64), (2**10, 65)])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_every_choice_of_form_is_the_loop(monkeypatch, shape, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 1, shape), rng.normal(size=shape)
    got = jax.jit(lambda a, b: recurrence.backward(a, b))(np.float32(a), np.float32(b))
    np.testing.assert_allclose(got, by_loop(a, b, 0.0, True), **close32)


# --------------------------------------------------------------------------- textbook definitions


@every_case
@pytest.mark.parametrize("shape", [(11,), (2, 2, 6), (4, 1)])
def test_definition_with_terminations_truncations_and_masks(x64, name, shape):
    options, reference = CASES[name]
    for seed in range(3):
        d = make(seed, shape)
        got = call(name, d, **options)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, reference(d, **options), **close64)


@every_case
@pytest.mark.parametrize(
    "form", [recurrence._associative, recurrence._halved], ids=["associative", "halved"]
)
def test_definition_by_every_form_of_the_recurrence(monkeypatch, name, form):
    def backward(a, b, start=None):
        start = jnp.zeros(a.shape[:-1], a.dtype) if start is None else start
        return form(a, b, start, True)  # True: reversed, or one round of merging

    monkeypatch.setattr(recurrence, "backward", backward)
    options, reference = CASES[name]
    d = make(1)
    got = call(name, d, **options)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(d, **options), **close32)


@pytest.mark.parametrize(
    "name", ["lambda_returns", "gae", "v_trace.targets", "v_trace.advantages", "retrace"]
)
def test_lambda_may_vary_over_time(x64, name):
    options, reference = CASES[name]
    d = make(5)
    options = {**options, "lambda_": np.random.default_rng(0).uniform(size=d["rewards"].shape)}
    np.testing.assert_allclose(call(name, d, **options), reference(d, **options), **close64)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 11, 1000])
def test_n_step_for_every_window(x64, n):
    d = make(2)
    np.testing.assert_allclose(call("n_step", d, n=n), n_step_by_sums(d, n=n), **close64)


def test_discounted_with_and_without_bootstrap(x64):
    d = make(3)
    r, g, mask = d["rewards"], d["discounts"], d["mask"]
    tail = np.random.default_rng(1).normal(size=3)
    # A bootstrap is one more reward behind the last step.
    padded = {
        "rewards": np.concatenate([r, tail[:, None]], 1),
        "discounts": np.concatenate([g, np.zeros((3, 1))], 1),
        "next_values": np.concatenate([d["next_values"], np.zeros((3, 1))], 1),
        "truncated": np.concatenate([d["truncated"], np.zeros((3, 1), bool)], 1),
        "mask": np.concatenate([mask, np.ones((3, 1), bool)], 1),
    }
    got = returns.discounted(
        r, g, bootstrap=tail, truncated=d["truncated"], next_values=d["next_values"], mask=mask
    )
    np.testing.assert_allclose(got, discounted_by_sums(padded)[:, :-1], **close64)
    plain = {**padded, "truncated": np.zeros_like(padded["truncated"])}
    expected = discounted_by_sums(plain)[:, :-1]
    np.testing.assert_allclose(
        returns.discounted(r, g, bootstrap=tail, mask=mask), expected, **close64
    )
    unread = returns.discounted(r, g, bootstrap=tail, next_values=d["next_values"], mask=mask)
    np.testing.assert_allclose(unread, expected, **close64)
    plain["rewards"] = np.concatenate([r, np.zeros((3, 1))], 1)
    expected = discounted_by_sums(plain)[:, :-1]
    np.testing.assert_allclose(returns.discounted(r, g, mask=mask), expected, **close64)


def test_discounted_reads_next_values_only_where_it_bootstraps(x64):
    d = make(4, (2, 8), masked=0.0)
    clean = call("discounted", d)
    read = d["truncated"].copy()
    read[:, -1] = True
    d["next_values"] = np.where(read, d["next_values"], np.nan)
    np.testing.assert_array_equal(call("discounted", d), clean)
    grads = jax.grad(lambda v: call("discounted", {**d, "next_values": v}).sum())(d["next_values"])
    assert np.all(np.isfinite(grads))


def test_next_values_within(x64):
    nan = np.nan
    values = np.array([[1.0, 2.0, 3.0, 4.0], [nan, 2.0, nan, 4.0], [nan] * 4, [nan, 5.0, nan, nan]])
    mask = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
    got = returns.next_values_within(values, mask, final=np.array([9.0, 8.0, 7.0, 6.0]))
    expected = [[2, 3, 4, 9], [0, 4, 0, 8], [0, 0, 0, 0], [0, 6, 0, 0]]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(returns.next_values_within(values, mask)[0], [2, 3, 4, 0])


# ------------------------------------------------------------------------------------ known results


def test_gae_without_values_is_return_to_go():
    rewards = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    zeros, ones = np.zeros_like(rewards), np.ones_like(rewards)
    got = returns.gae(rewards, zeros, zeros, ones, lambda_=1.0)
    np.testing.assert_allclose(got, rewards[:, ::-1].cumsum(1)[:, ::-1], **close32)


def test_one_trajectory_by_hand():
    """Two episodes, the first truncated, the second terminated; γ = λ = 1/2."""
    got = returns.gae(
        jnp.array([1.0, 2.0, 3.0, 4.0]),
        jnp.array([10.0, 20.0, 30.0, 40.0]),
        jnp.array([20.0, 100.0, 40.0, 1e6]),
        jnp.array([0.5, 0.5, 0.5, 0.0]),
        lambda_=0.5,
        truncated=jnp.array([False, True, False, False]),
    )
    # δ = 1+10-10, 2+50-20, 3+20-30, 4-40
    np.testing.assert_array_equal(got, [1 + 0.25 * 32, 32, -7 + 0.25 * -36, -36])


def test_termination_and_truncation_differ():
    one = jnp.ones((1,), jnp.float32)
    value = 5 * one
    arguments = (one, 0 * one, value)
    terminated = returns.gae(*arguments, 0 * one, lambda_=1.0)
    truncated = returns.gae(*arguments, one, lambda_=1.0, truncated=jnp.array([True]))
    assert (terminated[0], truncated[0]) == (1.0, 6.0)


def consistent(seed, steps=12):
    """One unbroken record whose next values are the following values, as RLax assumes."""
    d = make(seed, (steps,), masked=0.0)
    final = 0.3
    d["next_values"] = np.append(d["values"][1:], final)
    d["truncated"][:] = False
    return {k: x if x.dtype == bool else x.astype(np.float32) for k, x in d.items()}, final


@pytest.mark.parametrize("lambda_", [0.7, 1.0])
def test_rlax_agrees(lambda_):
    d, final = consistent(0)
    r, g, v, w = (jnp.asarray(d[k]) for k in ("rewards", "discounts", "values", "ratios"))
    v_next = jnp.asarray(d["next_values"])
    np.testing.assert_allclose(
        call("gae", d, lambda_=lambda_),
        rlax.truncated_generalized_advantage_estimation(r, g, lambda_, jnp.append(v, final)),
        **close32,
    )
    np.testing.assert_allclose(
        call("lambda_returns", d, lambda_=lambda_),
        rlax.lambda_returns(r, g, v_next, lambda_),
        **close32,
    )
    np.testing.assert_allclose(
        call("discounted", d), rlax.discounted_returns(r, g, v_next), **close32
    )
    for n in (1, 3, 12):
        np.testing.assert_allclose(
            call("n_step", d, n=n), rlax.n_step_bootstrapped_returns(r, g, v_next, n), **close32
        )
    for rho_bar in (1.0, 2.5):
        theirs = rlax.vtrace_td_error_and_advantage(
            v, v_next, r, g, w, lambda_, rho_bar, clip_pg_rho_threshold=rho_bar
        )
        ours = returns.v_trace(r, v, v_next, g, w, lambda_=lambda_, rho_bar=rho_bar)
        np.testing.assert_allclose(ours.targets, v + theirs.errors, **close32)
        if lambda_ == 1.0:  # below 1, RLax mixes the next target with the next value
            np.testing.assert_allclose(ours.advantages, theirs.pg_advantage, **close32)


def test_rlax_agrees_on_retrace():
    rng = np.random.default_rng(0)
    steps, actions, lambda_ = 9, 4, 0.9
    q = jnp.asarray(rng.normal(size=(steps + 1, actions)), jnp.float32)
    pi = jax.nn.softmax(jnp.asarray(rng.normal(size=(steps + 1, actions)), jnp.float32))
    mu = jax.nn.softmax(jnp.asarray(rng.normal(size=(steps + 1, actions)), jnp.float32))
    act = rng.integers(actions, size=steps + 1)
    taken = (np.arange(steps + 1), act)
    r = jnp.asarray(rng.normal(size=steps), jnp.float32)
    g = jnp.asarray(rng.uniform(size=steps), jnp.float32)
    ratio = (pi / mu)[taken]
    theirs = rlax.general_off_policy_returns_from_action_values(
        q[1:], jnp.asarray(act[1:]), r, g, lambda_ * jnp.minimum(1.0, ratio[1:]), pi[1:]
    )
    v = (pi * q).sum(-1)
    ours = returns.retrace(r, q[taken][:-1], v[1:], g, ratio[:-1], lambda_=lambda_)
    np.testing.assert_allclose(ours, theirs, **close32)


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("bars", [(1.0, 1.0), (3.0, 2.0), (np.inf, 1.0)])
def test_v_trace_on_policy_is_the_lambda_return(x64, lambda_, bars):
    d, _ = consistent(1)
    d = {k: x if x.dtype == bool else x.astype(np.float64) for k, x in d.items()}
    d["ratios"] = np.ones_like(d["ratios"])
    got = call("v_trace.targets", d, lambda_=lambda_, rho_bar=bars[0], c_bar=bars[1])
    np.testing.assert_allclose(got, lambda_returns_by_mixture(d, lambda_=lambda_), **close64)


def test_v_trace_returns_the_weights_it_used():
    d = make(0)
    rhos = call("v_trace.rhos", d, **BARS)
    np.testing.assert_allclose(rhos, np.where(d["mask"], np.minimum(1.7, d["ratios"]), 0), 1e-6)


def tree(seed=0, depth=3, actions=2):
    """A random tree: action probabilities and rewards for every history, and all full histories."""
    rng = np.random.default_rng(seed)
    nodes = [h for n in range(depth) for h in itertools.product(range(actions), repeat=n)]
    pi = {h: rng.dirichlet(np.ones(actions)) for h in nodes}
    mu = {h: rng.dirichlet(np.ones(actions)) for h in nodes}
    reward = {(*h, a): rng.normal() for h in nodes for a in range(actions)}
    return pi, mu, reward, list(itertools.product(range(actions), repeat=depth))


def q_of(pi, reward, gamma, history):
    """Q^π of the action that completes `history`, by recursion over the tree."""
    value = 0.0
    if history in pi:
        value = sum(p * q_of(pi, reward, gamma, (*history, a)) for a, p in enumerate(pi[history]))
    return reward[history] + gamma * value


def test_unclipped_v_trace_is_unbiased_for_the_target_policy(x64):
    """E_μ[target] = V^π at the root by enumeration, whatever the value function says."""
    pi, mu, reward, histories = tree()
    gamma, rng = 0.9, np.random.default_rng(1)
    guess = {h: rng.normal() for h in pi}
    expected = {np.inf: 0.0, 1.0: 0.0}
    for h in histories:
        prefixes = [h[:t] for t in range(3)]
        chance = np.prod([mu[p][h[len(p)]] for p in prefixes])
        v = np.array([guess[p] for p in prefixes])
        for bar in expected:
            out = returns.v_trace(
                np.array([reward[h[: t + 1]] for t in range(3)]),
                v,
                np.append(v[1:], 0.0),
                np.array([gamma, gamma, 0.0]),
                np.array([pi[p][h[len(p)]] / mu[p][h[len(p)]] for p in prefixes]),
                rho_bar=bar,
                c_bar=bar,
            )
            expected[bar] += chance * float(out.targets[0])
    truth = sum(p * q_of(pi, reward, gamma, (a,)) for a, p in enumerate(pi[()]))
    np.testing.assert_allclose(expected[np.inf], truth, **close64)
    assert abs(expected[1.0] - truth) > 1e-3  # clipping buys its variance with a bias


def test_clipped_v_trace_has_the_fixed_point_of_the_paper(x64):
    """With one state, V = E_{π_ρ̄}[r] / (1 - γ), π_ρ̄ ∝ min(ρ̄ μ, π), is left where it is."""
    pi, mu, r, gamma, rho_bar = (
        np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3]), np.array([1.0, -2.0, 0.5]), 0.9, 1.5
    )  # fmt: skip
    clipped = np.minimum(rho_bar * mu, pi)
    value = clipped @ r / clipped.sum() / (1 - gamma)
    total = 0.0
    for acts in itertools.product(range(3), repeat=3):
        a = np.array(acts)
        v = np.full(3, value)
        out = returns.v_trace(
            r[a], v, v, np.full(3, gamma), pi[a] / mu[a], rho_bar=rho_bar, c_bar=0.8, lambda_=0.7
        )
        total += np.prod(mu[a]) * float(out.targets[0])
    np.testing.assert_allclose(total, value, **close64)


def test_retrace_leaves_the_true_action_values_where_they_are(x64):
    """E_μ[target | first action] = Q^π for Q = Q^π, by enumeration."""
    pi, mu, reward, histories = tree(2)
    gamma = 0.9
    total = np.zeros(2)
    for h in histories:
        q = np.array([q_of(pi, reward, gamma, h[: t + 1]) for t in range(3)])
        v_next = [
            sum(p * q_of(pi, reward, gamma, (*h[:t], a)) for a, p in enumerate(pi[h[:t]]))
            for t in (1, 2)
        ]
        target = returns.retrace(
            np.array([reward[h[: t + 1]] for t in range(3)]),
            q,
            np.array([*v_next, 0.0]),
            np.array([gamma, gamma, 0.0]),
            np.array([pi[h[:t]][h[t]] / mu[h[:t]][h[t]] for t in range(3)]),
            lambda_=0.8,
        )
        total[h[0]] += mu[h[:1]][h[1]] * mu[h[:2]][h[2]] * float(target[0])
    np.testing.assert_allclose(total, [q_of(pi, reward, gamma, (a,)) for a in range(2)], **close64)


# ------------------------------------------------------------------------------------------- masks

BASE, TOTAL = 5, 9
garbage = st.sampled_from([0.0, -3.0, 1e30, np.nan, np.inf, -np.inf])


@every_case
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 100),
    columns=st.sets(st.integers(0, TOTAL - 1), min_size=BASE, max_size=BASE),
    junk=garbage,
    flag=st.booleans(),
)
def test_inserting_masked_columns_changes_nothing(name, seed, columns, junk, flag):
    options, _ = CASES[name]
    d = make(seed, (2, BASE), masked=0.0)
    at = sorted(columns)
    wide = {}
    for k, x in d.items():
        fill = {"truncated": flag, "mask": False}.get(k, junk)
        wide[k] = np.full((2, TOTAL), fill, x.dtype)
        wide[k][:, at] = x
    got = call(name, wide, **options)
    np.testing.assert_allclose(got[:, at], call(name, d, **options), rtol=1e-6, atol=1e-7)
    assert not np.any(np.delete(np.asarray(got), at, 1))


@every_case
@pytest.mark.parametrize("kept", [0.7, 0.0])
def test_garbage_behind_the_mask_reaches_no_value_and_no_gradient(name, kept):
    options, _ = CASES[name]
    d = make(7, (3, 10), masked=1 - kept)
    names = [k for k, x in d.items() if x.dtype != bool]
    clean = {k: jnp.asarray(np.where(d["mask"], d[k], 0.0), jnp.float32) for k in names}
    dirty = {k: jnp.where(d["mask"], clean[k], jnp.nan) for k in names}
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10)), jnp.float32)

    def loss(arrays):
        lam = {"lambda_": arrays["lambda_"]} if "lambda_" in options else {}
        return jnp.sum(weight * call(name, {**d, **arrays}, **{**options, **lam}))

    lam = jnp.full((3, 10), 0.8, jnp.float32)
    gradient = jax.jit(jax.value_and_grad(loss))
    value, grads = gradient({**clean, "lambda_": lam})
    dirty_lam = jnp.where(d["mask"], lam, jnp.nan)
    value_, grads_ = gradient({**dirty, "lambda_": dirty_lam})
    assert value == value_ and np.isfinite(value)
    for k in grads:
        np.testing.assert_array_equal(grads[k], grads_[k])
        assert not np.any(np.where(d["mask"], 0, grads_[k]))
    if not kept:
        assert value == 0 and not np.any(call(name, {**d, **dirty}, **options))
    else:
        assert any(np.any(g) for g in grads.values())


@every_case
def test_an_all_true_mask_is_no_mask(name):
    options, _ = CASES[name]
    d = make(0, masked=0.0)
    np.testing.assert_allclose(
        call(name, {**d, "mask": None}, **options), call(name, d, **options), rtol=1e-6, atol=1e-7
    )
    no_cut = {**d, "truncated": np.zeros_like(d["mask"])}
    np.testing.assert_allclose(
        call(name, {**d, "truncated": None}, **options),
        call(name, no_cut, **options),
        rtol=1e-6,
        atol=1e-7,
    )


def test_rows_of_tokens_by_hand():
    """Tool output stands between the policy's tokens, a prompt before and padding behind them."""
    mask = jnp.array([[False, True, True, False, True, False]])
    values = jnp.array([[jnp.nan, 1.0, 2.0, jnp.nan, 3.0, jnp.nan]])
    rewards = jnp.array([[0.0, 0.0, 0.0, 0.0, 5.0, 0.0]])
    got = returns.gae(
        rewards,
        values,
        returns.next_values_within(values, mask),
        jnp.ones((1, 6)),
        lambda_=1.0,
        mask=mask,
    )
    np.testing.assert_array_equal(got, [[0, 4, 3, 0, 2, 0]])


def test_one_step():
    r, v, v_next, g, w = (jnp.array([x]) for x in (2.0, 1.0, 4.0, 0.5, 3.0))
    assert returns.gae(r, v, v_next, g, lambda_=0.9)[0] == 3
    assert returns.lambda_returns(r, v_next, g, lambda_=0.9)[0] == 4
    assert returns.n_step(r, v_next, g, n=5)[0] == 4
    assert returns.discounted(r, g)[0] == 2
    assert returns.discounted(r, g, bootstrap=4.0)[0] == 4
    assert returns.discounted(r, g, next_values=v_next)[0] == 4
    assert returns.retrace(r, v, v_next, g, w)[0] == 4
    out = returns.v_trace(r, v, v_next, g, w, rho_bar=2.0)
    assert (out.targets[0], out.advantages[0], out.rhos[0]) == (7, 6, 2)
    assert returns.next_values_within(v, jnp.array([True]), final=3.0)[0] == 3


# -------------------------------------------------------------------------- transformations, dtypes


@every_case
def test_jit_and_vmap_are_the_plain_call(name):
    options, _ = CASES[name]
    d = {k: jnp.asarray(x) for k, x in make(0, (2, 3, 7)).items()}
    plain = call(name, d, **options)
    np.testing.assert_allclose(
        jax.jit(lambda d: call(name, d, **options))(d), plain, rtol=1e-6, atol=1e-6
    )
    mapped = jax.jit(jax.vmap(jax.vmap(lambda d: call(name, d, **options))))(d)
    np.testing.assert_allclose(mapped, plain, rtol=1e-6, atol=1e-6)


def test_scalar_options_may_be_traced():
    d = {k: jnp.asarray(x) for k, x in make(0).items()}
    run = jax.jit(lambda lam, rho, c: call("v_trace.targets", d, lambda_=lam, rho_bar=rho, c_bar=c))
    np.testing.assert_allclose(
        run(0.8, 1.7, 0.9), call("v_trace.targets", d, lambda_=0.8, **BARS), rtol=1e-6, atol=1e-6
    )


@every_case
def test_gradients_are_the_finite_differences(x64, name):
    options, _ = CASES[name]
    d = make(0, (2, 6))
    names = [k for k, x in d.items() if x.dtype != bool]

    @jax.jit
    def f(arrays):
        return call(name, {**d, **arrays}, **options)

    check_grads(f, ({k: d[k] for k in names},), order=1, modes=("fwd", "rev"), rtol=1e-6, atol=1e-6)


def test_lower_precision_is_computed_in_float32():
    d = make(0, masked=0.0)
    half = {k: x if x.dtype == bool else jnp.asarray(x, jnp.bfloat16) for k, x in d.items()}
    widened = {k: x if x.dtype == bool else np.asarray(x, np.float32) for k, x in half.items()}
    got = call("gae", half, lambda_=0.9)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, call("gae", widened, lambda_=0.9))
    assert returns.linear_recurrence(half["rewards"], half["values"]).dtype == jnp.float32


def test_sharded_over_two_devices():
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, PartitionSpec as P
        from pgjax import returns
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
        def f(x, m):
            g = jnp.full_like(x, 0.9)
            v = returns.next_values_within(x, m)
            return (
                returns.gae(x, x, v, g, lambda_=0.9, mask=m),
                returns.v_trace(x, x, v, g, jnp.exp(x), truncated=m),
                returns.discounted(x, g, bootstrap=1.0),
                returns.n_step(x, v, g, n=3, mask=m),
            )
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        split = P("data")
        run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(split, split), out_specs=split))
        for got, want in zip(jax.tree.leaves(run(x, x > 0)), jax.tree.leaves(f(x, x > 0))):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        print("true")
    """
    assert devices.run(script, devices=2)


# --------------------------------------------------------------------------------------- bad input

X = jnp.ones((2, 3))
YES = jnp.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("message", "run"),
    [
        ("next_values: expected shape", lambda: returns.gae(X, X, X[:1], X, lambda_=1.0)),
        ("mask: expected shape", lambda: returns.gae(X, X, X, X, lambda_=1.0, mask=YES[0])),
        ("mask: expected dtype bool", lambda: returns.gae(X, X, X, X, lambda_=1.0, mask=X)),
        ("truncated: expected dtype", lambda: returns.gae(X, X, X, X, lambda_=1.0, truncated=X)),
        ("rewards: expected a floating", lambda: returns.gae(YES, X, X, X, lambda_=1.0)),
        ("rewards: expected shape", lambda: returns.discounted(jnp.ones(()), jnp.ones(()))),
        ("rewards: expected shape", lambda: returns.discounted(X[:, :0], X[:, :0])),
        ("lambda_: expected a number", lambda: returns.gae(X, X, X, X, lambda_=1.1)),
        ("lambda_: expected a number", lambda: returns.retrace(X, X, X, X, X, lambda_=-0.1)),
        ("lambda_: expected a scalar", lambda: returns.gae(X, X, X, X, lambda_=X[0])),
        ("lambda_: expected a floating", lambda: returns.gae(X, X, X, X, lambda_=YES)),
        ("bootstrap: expected a scalar", lambda: returns.discounted(X, X, bootstrap=X)),
        ("next_values: expected an array", lambda: returns.discounted(X, X, truncated=YES)),
        ("n: expected an integer", lambda: returns.n_step(X, X, X, n=0)),
        ("rho_bar: expected at least", lambda: returns.v_trace(X, X, X, X, X, rho_bar=0.5)),
        ("rho_bar: expected a number", lambda: returns.v_trace(X, X, X, X, X, rho_bar=0.0)),
        ("c_bar: expected a number", lambda: returns.v_trace(X, X, X, X, X, c_bar=-1.0)),
        ("ratios: expected shape", lambda: returns.v_trace(X, X, X, X, X[0])),
        ("final: expected a scalar", lambda: returns.next_values_within(X, YES, final=X)),
        ("mask: expected a bool", lambda: returns.next_values_within(X, None)),
        ("inputs: expected shape", lambda: returns.linear_recurrence(X, X[0])),
        ("initial: expected", lambda: returns.linear_recurrence_sequential(X, X, initial=X[0])),
    ],
)
def test_bad_input_is_named(message, run):
    with pytest.raises(ValueError, match=message):
        run()


def test_n_has_to_be_an_integer():
    with pytest.raises(TypeError):
        returns.n_step(X, X, X, n=2.0)
