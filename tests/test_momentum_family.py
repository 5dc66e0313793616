"""Accelerated methods: published rates and parameters, the heavy ball's cycle, limits in time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from pgjax.optim import momentum_family as family
from pgjax.optim import ode

METHODS = {
    "gd": family.gd_params,
    "heavy ball": family.heavy_ball_params,
    "nesterov": family.nesterov_params,
    "triple momentum": family.triple_momentum_params,
}


def iterates(coefficients, grad_f, start, steps):
    """x_0 to x_steps, and the outputs z."""
    method = family.three_parameter_method(coefficients)

    def step(carry, _):
        x, state = carry
        g = grad_f(family.query_point(coefficients, state, x))
        update, after = method.update(g, state, x)
        return (x + update, after), (x, family.output_point(coefficients, state, x))

    @jax.jit
    def run(start):
        (x, state), found = jax.lax.scan(step, (start, method.init(start)), length=steps)
        last = (x, family.output_point(coefficients, state, x))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), found, last)

    return jax.tree.map(np.asarray, run(start))


def test_rates():
    with jax.enable_x64(True):
        values = jnp.linspace(1.0, 25.0, 2001)
        for name, want in (
            ("gd", 12 / 13),
            ("nesterov", 0.8),
            ("triple momentum", 0.8),
            ("heavy ball", 2 / 3),
        ):
            found = family.quadratic_rate(METHODS[name](1.0, 25.0), values)
            # Heavy ball has a double root at the ends, which costs half the digits.
            assert float(found) == pytest.approx(want, abs=1e-7 if name == "heavy ball" else 1e-12)
    # Against NumPy's eigenvalues of the companion matrix.
    a, b, c, e = 0.05, 0.6, 0.3, 0.0
    radii = [
        np.abs(np.linalg.eigvals([[1 + b - a * v * (1 + c), -(b - a * v * c)], [1.0, 0.0]])).max()
        for v in np.linspace(1, 60, 50)
    ]
    found = family.quadratic_rate(
        family.MomentumParams(a, b, c, e), jnp.linspace(1.0, 60.0, 50, dtype=jnp.float32)
    )
    assert max(radii) > 1 and float(found) == pytest.approx(max(radii), rel=1e-4)


def test_triple_momentum_parameters():
    found = family.triple_momentum_params(1.0, 25.0)
    np.testing.assert_allclose(found, [0.072, 8 / 15, 0.296296296, 1.777777778], rtol=1e-8)


def kinked(x):
    """The derivative of a function with curvatures 25, 1 and 25 and its optimum at 0."""
    return jnp.where(x < 1, 25 * x, jnp.where(x < 2, x + 24, 25 * x - 24))


def test_heavy_ball_cycles():
    with jax.enable_x64(True):
        coefficients = family.heavy_ball_params(1.0, 25.0)
        np.testing.assert_allclose(coefficients[:2], [1 / 9, 4 / 9], rtol=1e-12)
        x, _ = iterates(coefficients, kinked, jnp.float64(3.3), 400)
        np.testing.assert_allclose(np.sort(x[-3:]), [-1.80245, 0.64653, 2.11592], atol=5e-6)
        np.testing.assert_allclose(x[-3:], x[-6:-3], atol=1e-9)
        x, _ = iterates(coefficients, kinked, jnp.float64(5.0), 400)
        assert abs(x[-1]) < 1e-9
        for name in ("nesterov", "triple momentum"):
            x, _ = iterates(METHODS[name](1.0, 25.0), kinked, jnp.float64(3.3), 40)
            assert np.abs(x).min() < 1e-3 and abs(x[-1]) < 1e-3


def test_without_momentum_it_is_sgd():
    ours = family.three_parameter_method(family.MomentumParams(0.1, 0.0, 0.0, 0.0))
    theirs = optax.sgd(0.1)
    x = {"a": jnp.array([1.0, -2.0])}
    y, states = x, [ours.init(x), theirs.init(x)]
    for _ in range(4):
        one, states[0] = ours.update(jax.tree.map(jnp.sin, x), states[0], x)
        two, states[1] = theirs.update(jax.tree.map(jnp.sin, y), states[1], y)
        x, y = optax.apply_updates(x, one), optax.apply_updates(y, two)
        np.testing.assert_allclose(x["a"], y["a"], rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_condition_one_takes_one_step(name):
    coefficients = METHODS[name](4.0, 4.0)
    x, z = iterates(coefficients, lambda x: 4 * x, jnp.array([1.0, -3.0]), 2)
    np.testing.assert_allclose(x[1:], 0, atol=1e-6)
    np.testing.assert_allclose(z[1:], x[1:] if coefficients.e == 0 else 0, atol=1e-6)
    assert coefficients.b == 0 and coefficients.a == pytest.approx(0.25)


def test_convex_nesterov_keeps_its_bound():
    values = jnp.array([1e-4, 1e-3, 1e-2, 0.1, 1.0])
    start = jnp.ones(5)
    coefficients = family.convex_nesterov_params(1.0, total=100)
    x, _ = iterates(coefficients, lambda x: values * x, start, 100)
    gaps = 0.5 * (np.asarray(values) * x**2).sum(1)
    k = np.arange(1, 101)
    assert (gaps[1:] <= 2 * 5 / (k + 1) ** 2).all()
    plain, _ = iterates(family.MomentumParams(1.0, 0.0, 0.0, 0.0), lambda x: values * x, start, 100)
    assert gaps[-1] < 0.2 * 0.5 * (np.asarray(values) * plain[-1] ** 2).sum()


def test_guarantee_of_triple_momentum_on_a_function_with_kinks():
    """Its output's distance falls by ρ a step, where the heavy ball does not converge."""
    with jax.enable_x64(True):
        _, z = iterates(METHODS["triple momentum"](1.0, 25.0), kinked, jnp.float64(3.3), 60)
        assert abs(z[60]) < 10 * 3.3 * 0.8**60


def motion_error(kind, discrete, end=3.0, **options):
    """Largest distance of iterates from the path, at times k √s."""
    values, step = jnp.array([1.0, 9.0]), discrete.a
    steps = round(end / step**0.5)
    x, _ = iterates(discrete, lambda x: values * x, jnp.array([1.0, 1.0]), steps)
    motion = ode.accelerated_ode(lambda x: values * x, kind, **options)
    speed = (x[1] - x[0]) / step**0.5 if kind in ("heavy_ball", "nesterov") else np.zeros(2)
    if kind in ("heavy_ball", "nesterov"):
        # The path's own start: x_1 - x_0 = √s x' + s/2 x'' with x'' from the equation.
        force = np.asarray(motion(jnp.float64(0), (jnp.ones(2), jnp.asarray(speed)))[1])
        speed = speed - step**0.5 / 2 * force
    fine = 8
    _, (path, _) = ode.rk4(
        motion,
        (jnp.ones(2), jnp.asarray(speed)),
        dt=step**0.5 / fine,
        steps=fine * steps,
    )
    return np.abs(np.asarray(path)[::fine] - x).max()


@pytest.mark.parametrize("name", ["heavy_ball", "nesterov"])
def test_orders_of_the_limits(name):
    """Error of the plain limit ~ √s; of the one with the next terms ~ s."""
    with jax.enable_x64(True):
        errors = {"plain": [], "next": []}
        for step in (1e-3, 2.5e-4):
            weight = (1 - step**0.5) / (1 + step**0.5)
            c = weight if name == "nesterov" else 0.0
            method = family.MomentumParams(step, weight, c, 0.0)
            errors["plain"].append(motion_error("strongly_convex", method, mu=1.0))
            errors["next"].append(motion_error(name, method, mu=1.0, step=step))
        assert errors["plain"][0] / errors["plain"][1] == pytest.approx(2, rel=0.1)
        assert errors["next"][0] / errors["next"][1] == pytest.approx(4, rel=0.1)
        assert errors["next"][1] < 0.2 * errors["plain"][1]


def test_convex_limit():
    with jax.enable_x64(True):
        errors = []
        for step in (1e-3, 2.5e-4):
            method = family.MomentumParams(step, lambda k: k / (k + 3), lambda k: k / (k + 3), 0.0)
            errors.append(motion_error("convex", method))
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # of order √s
        # f = x²/2: Bessel's J_1, the known solution 2 J_1(t) / t.
        motion = ode.accelerated_ode(lambda x: x, "convex")
        times, (x, _) = ode.rk4(motion, (jnp.float64(1), jnp.float64(0)), dt=0.01, steps=500)
        want = 2 * scipy.special.j1(times[1:]) / times[1:]
        np.testing.assert_allclose(x[1:], want, atol=1e-5)


@pytest.mark.parametrize("kind", ode.KINDS)
def test_energy_falls(kind):
    values = jnp.array([1.0, 25.0])
    options = {} if kind == "convex" else {"mu": 1.0}
    pull = 1.0
    if kind in ("heavy_ball", "nesterov"):
        options["step"] = 0.01
        pull = 1.1
    motion = ode.accelerated_ode(lambda x: values * x, kind, **options)
    state = (jnp.array([1.0, -1.0]), jnp.array([0.0, 0.0]))
    _, (x, v) = ode.rk4(motion, state, dt=0.005, steps=1500)
    energy = pull * 0.5 * (values * x**2).sum(1) + 0.5 * (v**2).sum(1)
    assert np.diff(np.asarray(energy, np.float64)).max() < 1e-5
    assert energy[-1] < 0.05 * energy[0]


def test_rk4_has_order_four():
    with jax.enable_x64(True):
        errors = []
        for steps in (20, 40):
            times, y = ode.rk4(
                lambda t, y: {"x": t * y["x"]}, {"x": jnp.float64(1)}, dt=2 / steps, steps=steps
            )
            assert times.shape == y["x"].shape == (steps + 1,)
            errors.append(abs(float(y["x"][-1]) - np.exp(2.0)))
        assert errors[0] / errors[1] == pytest.approx(16, rel=0.15)


def test_bad_input():
    for build in METHODS.values():
        for mu, smoothness in ((0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)):
            with pytest.raises(ValueError, match="mu"):
                build(mu, smoothness)
        with pytest.raises(ValueError, match="smoothness"):
            build(2.0, 1.0)
    with pytest.raises(ValueError, match="smoothness"):
        family.convex_nesterov_params(0.0, total=5)
    with pytest.raises(ValueError, match="total"):
        family.convex_nesterov_params(1.0, total=0)
    good = family.heavy_ball_params(1.0, 4.0)
    with pytest.warns(UserWarning, match="eigenvalues"):
        family.quadratic_rate(good, jnp.array([1.0, 5.0]), bounds=(1.0, 4.0))
    with pytest.raises(ValueError, match="eigenvalues: expected at least one"):
        family.quadratic_rate(good, jnp.zeros(0))
    with pytest.raises(ValueError, match="coefficients: expected numbers"):
        family.quadratic_rate(family.convex_nesterov_params(1.0, total=3), jnp.ones(1))
    with pytest.raises(ValueError, match="^a:"):
        family.three_parameter_method(family.MomentumParams(0.0, 0.0, 0.0, 0.0))
    method = family.three_parameter_method(good)
    with pytest.raises(ValueError, match="params: expected the present parameters"):
        method.update(jnp.ones(2), method.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="params: expected leaves"):
        method.update(jnp.ones(3), method.init(jnp.ones(2)), jnp.ones(3))
    for kind, options, name in (
        ("other", {}, "kind"),
        ("strongly_convex", {}, "mu: expected"),
        ("strongly_convex", {"mu": 0.0}, "mu"),
        ("nesterov", {"mu": 1.0}, "step: expected"),
        ("convex", {"mu": 1.0}, "mu: kind 'convex' has none"),
    ):
        with pytest.raises(ValueError, match=name):
            ode.accelerated_ode(jnp.sin, kind, **options)
    with pytest.raises(ValueError, match="dt"):
        ode.rk4(lambda t, y: y, 1.0, dt=0.0, steps=3)
    with pytest.raises(ValueError, match="steps"):
        ode.rk4(lambda t, y: y, 1.0, dt=0.1, steps=0)
    with pytest.raises(ValueError, match="motion: expected a tree like state"):
        ode.rk4(lambda t, y: (y, y), 1.0, dt=0.1, steps=2)
