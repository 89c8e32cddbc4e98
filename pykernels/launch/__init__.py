"""From torch tensors to GPU kernels: launch tables, allocations, results and gradients (the ops' fakes)."""
