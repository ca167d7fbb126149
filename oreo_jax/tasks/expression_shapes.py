"""The shapes that an expression of a number of operations can have."""

from __future__ import annotations

import numpy as np

# A binary tree of operations: None is a number, a pair is an operation.
Tree = tuple["Tree", "Tree"] | None


def expression_shapes(operations: int) -> np.ndarray:
  """Returns int[S, K, 2]: the operands of the operations of every shape.

  Values are numbered: K+1 leaves from left to right, then the K results in the
  order in which the operations are done, leftmost first.

  Args:
    operations: K, how many operations a shape has.
  """
  return np.array([_operands(tree) for tree in _trees(operations)])


def _trees(operations: int) -> list[Tree]:
  """Returns every tree with so many operations."""
  if operations == 0:
    return [None]
  return [
    (left, right)
    for k in range(operations)
    for left in _trees(k)
    for right in _trees(operations - 1 - k)
  ]


def _count(tree: Tree) -> int:
  return 0 if tree is None else 1 + _count(tree[0]) + _count(tree[1])


def _operands(tree: Tree) -> list[tuple[int, int]]:
  """Returns the operands of each operation, children before parents."""
  operations: list[tuple[int, int]] = []
  total = _count(tree)
  leaves = iter(range(total + 1))

  def visit(node: Tree) -> int:
    """Appends the operations below a node; returns its value's number."""
    if node is None:
      return next(leaves)
    operands = (visit(node[0]), visit(node[1]))
    operations.append(operands)
    return total + len(operations)

  visit(tree)
  return operations
