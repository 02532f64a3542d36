"""Operations with their first and second derivatives written out, for the parts of a model that second order is spent in.

Autograd differentiates a backward pass operation by operation, each of them a pass over memory, a kernel to launch and
tensors to keep. Written out, the same derivatives take a fraction of both. Each file opens with its formulas; all are
checked in float64 by gradcheck and gradgradcheck and against what they stand for. None has a third derivative.
"""
