"""moekit: FLAN-MoE in JAX. Sharded Mixture-of-Experts layers, FLAN mixtures, routing analysis.

Dimension letters everywhere: B batch, L length (T target length where both occur), D d_model,
F d_ff, E experts, K choices per token, C capacity, G groups, S tokens in a group, N heads, H head
dimension, V vocabulary.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so
`import moekit` takes no time.
"""

import lazy_loader

from moekit.installed import VERSION

__version__ = VERSION

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
