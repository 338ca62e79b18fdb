"""The attack engine: how an attack is computed, and computed fast. Which attacks there are is in `attacks`.

One step of PGD, in reading order:

- `goal`: `AttackGoal`, the function of the logits to maximise, and its gradient at the logits;
- `ascent`: `Ascent`, logits and input gradients of a network: `value_and_grad`, `vjp`, `goal_gradient`;
- `steps`: starting points and the projected step under each norm; `pgd_spec`: radius, step size, steps;
- `pgd`: the loop of gradient and step, with restarts; `attack_result`: its result;
- `one_step_starts`: results of attacks whose step the update makes;
- `shrinking_batch`: the loop of other attacks, whose finished images leave the batch.

What makes it fast. The engine never attacks the training network itself, but a replica of it:

- `engine`: `AttackEngine` puts everything together: ``engine.refresh()`` after an update of the weights,
  ``engine.run(x, goal, spec)`` for PGD, ``engine.captured(fn, x, ...)`` for any other attack;
- `attack_switches`: what it may use; `replica`: `AttackReplica`, the copy of the network, which is
- in half precision where autocast casts anyway (`cast_weights`),
- frozen, over the model's own memory (`network_modes`, checked by `copy_check` and `network_state`),
- folded: traced by `fx_tracing`, batch norm folded by `batch_norm_folding`, checked by `folding_check`,
- fused: convolution, residual and ReLU as one kernel (`epilogue_fusion`), where faster (`fusion_choice`),
- or run by Winograd's algorithm on the CPU (`winograd_layers`);
- `compiled_ascent`: the gradient as one compiled graph, checked by `compiled_attack_check`;
- `replica_state`: what a captured graph changes, for its check in `fastdynat.execution`;
- `followed_state`: whether a kept replica still computes what its network does.

Shared by the checks: `network_comparison` (two networks on the same images), `network_probe` (a gradient
reaches the images), `shortfall` (one attack is weaker than another), `input_checks` (images and labels of a
call), `zero_gradients` (messages about images that no gradient moves).
"""
