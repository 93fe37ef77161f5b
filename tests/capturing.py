"""What a CUDA graph does, on a CPU: operations are recorded with the tensors they read and wrote, and run again on them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""Operations for whose result the host would have to wait, which no graph can hold."""


class Graph(TorchDispatchMode):
    """Whatever the host computes while it is recorded is as it was then when it is replayed: a mistake would show."""

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in LOOKS:
            raise RuntimeError(f"{function} cannot be captured")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        output = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, output))
        return output

    def replay(self):
        for function, args, kwargs, output in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder:
    """In place of `real.live.run.CudaGraphs`."""

    def __init__(self):
        self.graph, self.before = None, []

    def begin(self):
        self.graph = Graph()
        self.graph.__enter__()

    def end(self):
        graph, self.graph = self.graph, None
        graph.__exit__(None, None, None)
        self.before += graph.before
        return graph

    def finish(self):
        """Undo what ran while it was recorded: on a GPU nothing does."""
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before = []

    def abort(self):
        if self.graph is not None:
            self.end()
        self.finish()
