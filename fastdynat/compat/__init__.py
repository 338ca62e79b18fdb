"""Interfaces of other libraries, running on fastdynat's attack engine.

- `torchattacks`: its attack classes, on `torchattacks_base`;
- `losses`: published training losses with the signatures of their releases, on `inner_attack`;
- `replica_cache`, `runner`, `agreement`: the replica that both run on, kept in step with the user's model;
- `speed_options`: keyword arguments that set how an attack is computed;
- `arguments`: the warning about images without a gradient.
"""

from fastdynat.compat.inner_attack import refresh

__all__ = ["refresh"]
