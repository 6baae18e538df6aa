"""The same promises on every backend of Keras 3 and on Keras 2, each in a process of its own."""

from __future__ import annotations

import textwrap

from tests.calibrate.backends import on_others, run_on

CHECK = textwrap.dedent(
    """
    import os
    import numpy as np
    from bnport.calibrate.run import calibrate
    from tests.calibrate import nets
    from tests.calibrate.nets import L, keras

    x = nets.data()
    # JAX compiles every operation anew for every shape: there, batches of one size
    SIZE = 35 if os.environ.get("KERAS_BACKEND") == "jax" else 16

    # population: the bits of one prefix pass per layer; memory 0: the same bits through the disk
    model = nets.branches()
    result = calibrate(model, x, batch_size=SIZE)
    assert result.rounds == 4, result.rounds
    ours = nets.held(model)
    result.undo()
    result = calibrate(model, x, batch_size=SIZE, memory=0)
    assert result.spilled
    assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, nets.held(model), strict=True))
    result.undo()
    nets.prefix_passes(model, x, SIZE)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, nets.held(model), strict=True))

    # a subclassed model of the same layers
    before = nets.held(model)
    subclassed = nets.Subclassed(model)
    subclassed(x[:2])
    calibrate(subclassed, x, batch_size=SIZE)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, nets.held(model), strict=True))

    # nested, and a shared tower with inputs by name, against two passes in extended precision
    deep = nets.nested()
    result = calibrate(deep, x, batch_size=SIZE)
    assert len(result.layers) == 3 and result.rounds == 3, result
    nets.close_to_two_pass(deep, x, SIZE)
    towers = nets.siamese()
    two = {"a": nets.data(70, (6,), 4, 1), "b": nets.data(70, (6,), -4, 3)}
    calibrate(towers, two, batch_size=SIZE)
    nets.close_to_two_pass(towers, two, SIZE)

    # moving against Keras' own training calls; only statistics change
    model = nets.branches()
    for layer in model.layers:
        if isinstance(layer, L.Dropout):
            layer.rate = 0.0
    before = nets.held(model)
    result = calibrate(model, x, batch_size=SIZE, method="moving")
    found = {layer.name: layer for layer in result.layers}
    statistics = {id(v) for layer in nets.norms(model) for v in (layer.moving_mean, layer.moving_variance)}
    for old, new, variable in zip(before, nets.held(model), model.weights, strict=True):
        assert (old.tobytes() == new.tobytes()) == (id(variable) not in statistics)
    result.undo()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(model), strict=True))
    fused_unbiased = keras.__version__.startswith("2.")  # Keras 2 keeps unbiased variances for images
    result = calibrate(model, x, batch_size=SIZE, method="moving", unbiased=fused_unbiased)
    found = {layer.name: layer for layer in result.layers}
    result.undo()
    for batch in nets.batches_of(x, SIZE):
        model(batch, training=True)
    for layer in nets.norms(model):
        if layer.name == "fine" and fused_unbiased:
            continue  # not an image: biased again
        np.testing.assert_allclose(found[layer.name].mean, nets.numpy(layer.moving_mean.numpy()), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[layer.name].variance, nets.numpy(layer.moving_variance.numpy()), rtol=1e-4)

    # precise: the first layer sees the same under every method
    before = calibrate(model, x, batch_size=SIZE, method="precise")["stem"]
    after = calibrate(model, x, batch_size=SIZE)["stem"]
    assert before.variance.tobytes() == after.variance.tobytes()
    print("all held")
    """
)


@on_others
def test_statistics_are_right_and_nothing_else_changes_on(where):
    run_on(where, "-c", CHECK)
