"""The form, its curricula, shaping and actions in parts: against enumeration and closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import agents, curriculum, policies, rewards, values
from pgjax.envs import webform
from pgjax.models import qweb

RNG = np.random.default_rng(0)
FORM = webform.Form(num_fields=3, num_elements=10, num_keys=12, num_values=9, max_steps=6)
KEY = jax.random.key(0)


def play(state, actions, form=FORM):
    """Steps of these (element, verb, argument), as lists."""
    seen = []
    for action in actions:
        step = webform.step(form, state, policies.CompositeAction(*map(jnp.int32, action)))
        state = step.state
        seen.append((float(step.reward), bool(step.terminated)))
    return state, seen


def solution(state):
    button = int(jnp.argmax(state.tags == webform.BUTTON))
    types = [(int(place), 1, i) for i, place in enumerate(state.places)]
    return types, (button, 0, 0)


def test_pages_hold_what_the_instruction_needs():
    states = jax.vmap(functools.partial(webform.new_page, FORM))(jax.random.split(KEY, 50))
    named = jnp.take_along_axis(states.names, states.places, axis=1)
    np.testing.assert_array_equal(named, states.keys)
    there = jnp.take_along_axis(states.tags, states.places, axis=1)
    assert (there == webform.INPUT).all() and (states.written == 0).all()
    assert ((states.tags == webform.BUTTON).sum(1) == 1).all()
    assert ((states.tags == webform.INPUT).sum(1) == FORM.num_inputs).all()
    for tags, names in zip(*map(np.asarray, (states.tags, states.names)), strict=True):
        inputs = names[tags == webform.INPUT]
        assert len(set(inputs)) == len(inputs) and inputs.min() >= 1 and inputs.max() <= 12
        assert set(names[tags == webform.LABEL]) <= set(inputs)
    assert states.values.min() >= 1 and states.values.max() <= 9
    # Every element of the page is somewhere first, so the order says nothing.
    assert len(set(np.asarray(states.places[:, 0]).tolist())) == 10


def test_an_episode_ends_well_only_with_everything_right():
    state = webform.new_page(FORM, KEY)
    types, click = solution(state)
    assert play(state, [*types, click])[1] == [(0, False)] * 3 + [(1, True)]
    assert play(state, [*reversed(types), click])[1][-1] == (1, True)
    assert play(state, [*types[:2], click])[1][-1] == (-1, True)
    wrong = (types[0][0], 1, 1)
    assert (
        play(state, [*types, wrong, click])[1][-1] == (-1, True)
        or state.values[0] == state.values[1]
    )
    label = int(jnp.argmax(state.tags == webform.LABEL))
    idle, seen = play(state, [(label, 1, 0), (label, 0, 0), (types[0][0], 0, 0)] * 2)
    assert (idle.written == 0).all() and seen == [(0, False)] * 5 + [(-1, True)]
    half, _ = play(state, types[:1])
    np.testing.assert_allclose(webform.progress(half), 1 / 3, rtol=1e-6)


def test_warm_starts_and_sub_goals():
    state = webform.new_page(FORM, KEY)
    types, click = solution(state)
    done = webform.with_solved(state, curriculum.warm_start_mask(KEY, 3, chance=1.0))
    assert play(done, [click])[1] == [(1, True)]
    none = webform.with_solved(state, curriculum.warm_start_mask(KEY, 3, chance=0.0))
    jax.tree.map(np.testing.assert_array_equal, none, state)
    one = webform.with_needed(state, jnp.array([False, True, False, False]))
    assert play(one, [types[0], types[1]])[1] == [(0, False), (1, True)]
    assert play(one, [click])[1] == [(-1, True)]
    clicks = webform.with_needed(state, jnp.array([False, True, False, True]))
    assert play(clicks, [types[1], click])[1] == [(0, False), (1, True)]
    # A given key is a given mask; the chance and the sizes are what they say.
    draw = jax.vmap(lambda key: curriculum.warm_start_mask(key, 5, chance=0.3))
    keys = jax.random.split(KEY, 4000)
    np.testing.assert_array_equal(draw(keys), draw(keys))
    np.testing.assert_allclose(draw(keys).mean(0), 0.3, atol=0.03)
    for size in (1, 3, 5):
        masks = jax.vmap(lambda key, size=size: curriculum.subgoal_mask(key, 5, size=size))(keys)
        assert (masks.sum(1) == size).all()
        np.testing.assert_allclose(masks.mean(0), size / 5, atol=0.04)


def test_schedules_go_from_easy_to_the_task():
    shares = jnp.linspace(0, 1, 11)
    chance = curriculum.warm_start_chance(shares[3], until=0.6)
    np.testing.assert_allclose(chance, 0.5, rtol=1e-6)
    assert [float(curriculum.warm_start_chance(x)) for x in (0.0, 0.6, 1.0)] == [1, 0, 0]
    sizes = [int(curriculum.subgoal_size(float(x), num_parts=4)) for x in shares]
    assert sizes == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4]
    assert int(curriculum.subgoal_size(0.0, num_parts=1)) == 1


def test_random_walks_make_goals_that_can_be_reached():
    def made(key):
        page_key, walk_key = jax.random.split(key)
        state = webform.new_page(FORM, page_key)
        walk = curriculum.random_walk_goal(
            walk_key, webform.writable(state), num_visits=3, num_values=9
        )
        return webform.with_goal(state, *walk), walk

    states, walks = jax.vmap(made)(jax.random.split(KEY, 40))
    assert bool((~walks.stays).any())  # some walks come back
    for i in range(40):
        state = jax.tree.map(lambda x, i=i: x[i], states)
        written = np.zeros(10, int)
        for place, value in zip(walks.place[i], walks.value[i], strict=True):
            written[place] = value  # what the walk leaves, one visit after the other
        fields = [j for j in range(3) if walks.stays[i, j]]
        assert len(fields) == len(set(np.asarray(walks.place[i]).tolist()))
        types, click = solution(state)
        after, seen = play(state, [*(types[j] for j in fields), click])
        np.testing.assert_array_equal(after.written, written)
        assert seen[-1] == (1, True)
    nothing = jax.jit(functools.partial(curriculum.random_walk_goal, num_visits=2, num_values=3))(
        KEY, jnp.zeros(4, bool)
    )
    assert not nothing.stays.any()


def test_shaping_telescopes_and_leaves_the_best_policy():
    potentials = jnp.asarray(RNG.normal(size=6), jnp.float32)
    ended = jnp.arange(5) == 4
    shaped = rewards.potential_shaping(potentials[:-1], potentials[1:], ended, discount=0.9)
    np.testing.assert_allclose(np.sum(0.9 ** np.arange(5) * shaped), -potentials[0], rtol=1e-4)
    # Along all walks of a form, whatever their outcome.
    env = rewards.with_potential(webform.environment(FORM), webform.progress, discount=0.9)
    plain = webform.environment(FORM)
    kept = rewards.with_potential(plain, webform.progress, discount=0.9, counts_at_end=True)
    start, _ = plain.reset(KEY)
    start = webform.with_solved(start, jnp.array([True, False, False]))
    types, click = solution(start)
    for walk in itertools.permutations([*types[1:], click]):
        totals = []
        for world in (plain, env, kept):
            state, total = start, 0.0
            for t, action in enumerate(walk):
                index = policies.composite_index(
                    policies.CompositeAction(*map(jnp.int32, action)), num_arguments=3
                )
                step = world.step(KEY, state, index)
                total, state = total + 0.9**t * float(step.reward), step.state
                if step.terminated:
                    break
            totals.append(total)
        np.testing.assert_allclose(totals[1] - totals[0], -1 / 3, rtol=1e-5)
        end = 0.9 ** (t + 1) * float(webform.progress(state))
        np.testing.assert_allclose(totals[2] - totals[0], end - 1 / 3, rtol=1e-4, atol=1e-6)


def random_values(batch=(), elements=4, fields=3):
    shapes = (elements,), (elements, 2), (elements, fields)
    return policies.CompositeValues(
        *(jnp.asarray(RNG.normal(size=(*batch, *x)), jnp.float32) for x in shapes)
    )


def test_parts_are_chosen_one_after_the_other():
    found = random_values((6,))
    action = policies.composite_argmax(found)
    for i in range(6):
        element = int(np.argmax(found.element[i]))
        assert action.element[i] == element
        assert action.verb[i] == np.argmax(found.verb[i, element])
        assert action.argument[i] == np.argmax(found.argument[i, element])
    np.testing.assert_allclose(policies.composite_greedy_value(found), found.element.max(-1))
    # What is masked is never chosen.
    for _ in range(20):
        found = random_values((5,))
        elements = jnp.asarray(RNG.uniform(size=(5, 4)) < 0.5).at[:, 1].set(True)
        fields = jnp.asarray(RNG.uniform(size=(5, 3)) < 0.4)
        action = policies.composite_argmax(found, element_mask=elements, argument_mask=fields)
        assert jnp.take_along_axis(elements, action.element[:, None], 1).all()
        typed = action.verb == 1
        assert jnp.take_along_axis(fields, action.argument[:, None], 1)[typed].all()
    none = jnp.zeros((5, 4), bool)
    with pytest.raises(ValueError, match="^element_mask: expected at least one element"):
        policies.composite_argmax(found, element_mask=none)
    masked = jax.jit(lambda mask: policies.composite_argmax(found, element_mask=mask))(none)
    assert (masked.element == 0).all()
    value = jax.jit(lambda mask: policies.composite_greedy_value(found, element_mask=mask))(none)
    assert (value == 0).all()


def test_parts_and_indices_are_the_same_actions():
    index = jnp.arange(4 * (1 + 3))
    action = policies.composite_action(index, num_arguments=3)
    np.testing.assert_array_equal(policies.composite_index(action, num_arguments=3), index)
    assert (action.verb == 0).sum() == 4 and action.element.max() == 3
    click = policies.CompositeAction(jnp.int32(2), jnp.int32(0), jnp.int32(1))
    assert policies.composite_index(click, num_arguments=3) == 8  # its argument means nothing


def test_errors_add_up_over_the_parts_used():
    found, target = random_values((2,)), jnp.array([0.3, -2.0])
    action = policies.CompositeAction(jnp.array([1, 3]), jnp.array([0, 1]), jnp.array([2, 0]))
    loss = values.composite_error(found, action, target, error=values.value_error)
    wanted = [
        [found.element[0, 1], found.verb[0, 1, 0]],
        [found.element[1, 3], found.verb[1, 3, 1], found.argument[1, 3, 0]],
    ]
    for i in range(2):
        np.testing.assert_allclose(
            loss[i], sum(0.5 * (x - target[i]) ** 2 for x in wanted[i]), rtol=1e-5
        )
    slope = jax.grad(lambda x: values.composite_error(x, action, target).sum())(found)
    assert (slope.argument[0] == 0).all()  # a click's field
    assert [int((x != 0).sum()) for x in slope] == [2, 2, 1]
    detached = jax.grad(lambda y: values.composite_error(found, action, y).sum())(target)
    np.testing.assert_array_equal(detached, 0)


def network(form=FORM, size=8):
    numbers = {"num_keys": form.num_keys, "num_values": form.num_values}
    return agents.Network(
        lambda key: qweb.init(key, num_tags=webform.NUM_TAGS, size=size, **numbers),
        lambda params, observation: qweb.apply(params, webform.parse(form, observation)),
    )


def test_the_network_treats_elements_and_fields_as_sets():
    net = network()
    params = net.init(KEY)
    state = webform.with_solved(webform.new_page(FORM, KEY), jnp.array([True, False, False]))
    page = webform.parse(FORM, webform.observe(FORM, state))
    found = qweb.apply(params, page)
    order, fields = jnp.asarray(RNG.permutation(10)), jnp.array([2, 0, 1])
    moved = page._replace(
        tags=page.tags[order],
        names=page.names[order],
        written=page.written[order],
        keys=page.keys[fields],
        values=page.values[fields],
    )
    again = qweb.apply(params, moved)
    np.testing.assert_allclose(again.element, found.element[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.verb, found.verb[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        again.argument, found.argument[order][:, fields], rtol=1e-4, atol=1e-5
    )
    # What stands in padding changes nothing elsewhere.
    padded = page._replace(tags=page.tags.at[0].set(0), keys=page.keys.at[2].set(0))
    other = padded._replace(names=page.names.at[0].set(1), values=page.values.at[2].set(1))
    one, two = qweb.apply(params, padded), qweb.apply(params, other)
    np.testing.assert_allclose(one.element[1:], two.element[1:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.argument[1:, :2], two.argument[1:, :2], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="^page.keys: expected tokens in"):
        qweb.apply(params, page._replace(keys=page.keys.at[0].set(13)))


def test_literal_matches_alone_are_enough_to_copy_values():
    """With embeddings of 0 only the indicator tells pairs apart; a policy on it solves the form."""
    form = webform.Form(num_fields=2, num_elements=6, num_keys=8, num_values=9, max_steps=4)
    states = jax.vmap(functools.partial(webform.new_page, form))(jax.random.split(KEY, 30))

    def act(page):
        same = (page.names[:, None] == page.keys) & (page.tags == webform.INPUT)[:, None]
        open_ = (same & (page.written[:, None] != page.values)).astype(jnp.float32)
        button = (page.tags == webform.BUTTON).astype(jnp.float32)
        return policies.composite_argmax(
            policies.CompositeValues(
                open_.max(-1) + 0.5 * button, jnp.stack([button, open_.max(-1)], -1), open_
            )
        )

    def one(state, _):
        page = webform.parse(form, webform.observe(form, state))
        step = webform.step(form, state, act(page))
        return step.state, step.reward

    _, got = jax.vmap(lambda state: jax.lax.scan(one, state, None, length=3))(states)
    np.testing.assert_array_equal(got, np.tile([0, 0, 1], (30, 1)))
    # In the network: without embeddings, pairs of equal words still differ from the others.
    params = network(form).init(KEY)
    blank = params | {name: jnp.zeros_like(params[name]) for name in ("tag", "word", "value")}
    page = webform.parse(form, webform.observe(form, jax.tree.map(lambda x: x[0], states)))
    found = np.asarray(qweb.apply(blank, page).argument)
    same = np.asarray(page.names[:, None] == page.keys)
    assert np.ptp(found[same]) < 1e-5 and np.abs(found[same].mean() - found[~same]).min() > 1e-5


def test_the_agent_learns_a_form_of_one_field():
    form = webform.Form(num_fields=1, num_elements=3, num_keys=3, num_values=3, max_steps=4)
    env = rewards.with_potential(webform.environment(form), webform.progress, discount=0.99)
    agent = agents.composite_dqn(
        env,
        network(form, size=16),
        num_arguments=1,
        batch_size=32,
        start_steps=500,
        capacity=5_000,
        explore_over=4_000,
        learning_rate=3e-3,
    )
    _, metrics = jax.jit(functools.partial(agents.train, agent, num_updates=1200))(agent.init(KEY))
    # Of the shaped reward, the undiscounted sum: 1 - (1 - 0.99) at best.
    assert np.nanmean(metrics["return"][-200:]) > 0.6 > np.nanmean(metrics["return"][:50])
    assert np.isfinite(metrics["loss"]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: webform.Form(num_fields=0), "num_fields"),
        (lambda: webform.Form(num_fields=4, num_elements=4), "num_elements"),
        (lambda: webform.Form(num_keys=5), "num_keys"),
        (lambda: webform.Form(max_steps=0), "max_steps"),
        (lambda: webform.with_solved(webform.new_page(FORM, KEY), jnp.ones(4, bool)), "solved"),
        (lambda: webform.with_needed(webform.new_page(FORM, KEY), jnp.ones(3, bool)), "needed"),
        (lambda: webform.parse(FORM, jnp.ones(5)), "observation"),
        (lambda: curriculum.warm_start_mask(KEY, 3, chance=1.5), "chance"),
        (lambda: curriculum.warm_start_mask(KEY, 0, chance=0.5), "num_parts"),
        (lambda: curriculum.subgoal_mask(KEY, 3, size=4), "size"),
        (lambda: curriculum.subgoal_size(1.5, num_parts=3), "share"),
        (lambda: curriculum.warm_start_chance(-0.5), "share"),
        (
            lambda: curriculum.random_walk_goal(
                KEY, jnp.zeros(3, bool), num_visits=1, num_values=2
            ),
            "writable",
        ),
        (lambda: rewards.potential_shaping(jnp.ones(2), jnp.ones(3), discount=0.9), "next_pot"),
        (lambda: rewards.potential_shaping(jnp.ones(2), jnp.ones(2), discount=1.1), "discount"),
        (
            lambda: policies.composite_argmax(random_values()._replace(argument=jnp.ones((4, 0)))),
            "values.argument",
        ),
        (
            lambda: policies.composite_argmax(random_values(), element_mask=jnp.ones(3, bool)),
            "element_mask",
        ),
        (
            lambda: policies.composite_argmax(random_values(), argument_mask=jnp.ones(4, bool)),
            "argument_mask",
        ),
        (lambda: policies.composite_action(jnp.int32(3), num_arguments=0), "num_arguments"),
        (
            lambda: values.composite_error(
                random_values(),
                policies.composite_action(jnp.int32(3), num_arguments=3),
                jnp.ones(2),
            ),
            "targets",
        ),
        (
            lambda: agents.composite_dqn(webform.environment(FORM), network(), num_arguments=6),
            "num_arguments",
        ),
        (lambda: qweb.init(KEY, num_tags=0, num_keys=1, num_values=1), "num_tags"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"^{message}.*: expected"):
        call()


def test_a_quick_run_of_the_experiment_writes_its_files(tmp_path, capsys):
    import json

    from experiments import qweb_form

    assert qweb_form.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(found["claims"]) == 5 and len(found["table"]) == 5
    assert (tmp_path / "run" / "curves.png").is_file()
    for steps in ("100", "0"):
        assert qweb_form.main(["--steps", steps]) == 2
        found = capsys.readouterr().err
        assert "steps: expected a positive multiple of num_envs times evaluations, 64" in found
