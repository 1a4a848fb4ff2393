"""Pure functions on tensors: no modules, no state, no knowledge of methods."""
