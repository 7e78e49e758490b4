"""ONNX files: a traced JAX function, operator by operator, by the few operators that networks here consist of."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from metagater_jax.deploy.signature import Signature, needs
from metagater_jax.nn.convolution import native_operators

__all__ = ["to_onnx"]

# What every runtime of the last years has; 17 is the first with LayerNormalization, which is not used.
_OPSET, _IR = 17, 8


def to_onnx(signature: Signature) -> bytes:
  """A function as an ONNX model, with images in the layout that it has here (channels last).

  Args:
    signature: the function, its inputs and outputs. Where an input's size is symbolic (`jax.export.symbolic_shape`) the file takes any.

  Returns:
    The file's content.

  Raises:
    ImportError: without the package onnx.
    NotImplementedError: an operator that is not written yet; the message names it, and the layer that it is in.
  """
  onnx = needs("onnx")
  with native_operators():
    traced = jax.jit(lambda *inputs: signature.function(*inputs)).trace(*signature.inputs.values()).jaxpr
  graph = _Graph(onnx)
  names = dict(zip(traced.jaxpr.invars, signature.inputs))
  graph.names |= names
  graph.run(traced.jaxpr, traced.consts)
  for variable, name in zip(traced.jaxpr.outvars, signature.outputs, strict=True):
    graph.add("Identity", [graph.name(variable)], name=name)
  value = lambda name, aval: onnx.helper.make_tensor_value_info(
    name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype)), [size if isinstance(size, int) else str(size) for size in aval.shape]
  )
  model = onnx.helper.make_model(
    onnx.helper.make_graph(
      graph.nodes,
      "metagater",
      [value(name, variable.aval) for variable, name in names.items()],
      [value(name, variable.aval) for variable, name in zip(traced.jaxpr.outvars, signature.outputs)],
      graph.used_constants(),
    ),
    opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
    ir_version=_IR,
    producer_name="metagater_jax",
  )
  onnx.checker.check_model(model, full_check=True)
  return model.SerializeToString()


class _Graph:
  """The nodes so far, and the names of what they give by variable of the traced program."""

  def __init__(self, onnx: Any):
    self.onnx, self.nodes, self.constants = onnx, [], []
    self.names: dict[Any, str] = {}
    self.known: dict[str, np.ndarray] = {}  # values of constants by name

  def run(self, program, consts=(), place=""):
    self.names |= {variable: self.constant(np.asarray(value)) for variable, value in zip(program.constvars, consts, strict=True)}
    for equation in program.eqns:
      here = "/".join(filter(None, [place, str(equation.source_info.name_stack)]))
      inner = next((value for value in equation.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")), None)
      if inner is not None and equation.primitive.name in _CALLS:
        closed = inner if hasattr(inner, "consts") else None
        body = closed.jaxpr if closed else inner
        self.names |= {variable: self.name(atom) for variable, atom in zip(body.invars, equation.invars, strict=True)}
        self.run(body, closed.consts if closed else (), here)
        self.names |= {variable: self.name(atom) for variable, atom in zip(equation.outvars, body.outvars, strict=True)}
      elif equation.primitive.name in _OPERATORS:
        self.names[equation.outvars[0]] = _OPERATORS[equation.primitive.name](self, equation, *map(self.name, equation.invars))
      else:
        raise NotImplementedError(
          f"to_onnx has no operator for '{equation.primitive.name}', which stands in {here or 'the function itself'}. "
          f"It knows {', '.join(sorted(_OPERATORS))}; the StableHLO and .tflite exports know more."
        )

  def name(self, atom):
    if isinstance(atom, core.Literal):
      return self.constant(np.asarray(atom.val, atom.aval.dtype))
    return self.names[atom]

  def constant(self, value: np.ndarray) -> str:
    name = f"c{len(self.constants)}"
    self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
    self.known[name] = value
    return name

  def used_constants(self):
    read = {name for node in self.nodes for name in node.input}
    return [constant for constant in self.constants if constant.name in read]

  def add(self, operator: str, inputs: list[str], *, name: str | None = None, **attributes: Any) -> str:
    name = name or f"v{len(self.nodes)}"
    self.nodes.append(self.onnx.helper.make_node(operator, inputs, [name], **attributes))
    return name

  def transpose(self, x, order):
    if x in self.known:
      return self.constant(self.known[x].transpose(order))
    return self.add("Transpose", [x], perm=order)

  def reshape(self, x, shape):
    if x in self.known:
      return self.constant(self.known[x].reshape(shape))
    return self.add("Reshape", [x, self.constant(np.array([_size(size) for size in shape], np.int64))])


def _size(size):
  """−1 where it is not known: at most one of a shape is, the batch."""
  return size if isinstance(size, int) else -1


def _binary(operator: str) -> Callable:
  return lambda graph, equation, x, y: graph.add(operator, [x, y])


def _unary(operator: str) -> Callable:
  return lambda graph, equation, x: graph.add(operator, [x])


def _convolution(graph, equation, x, kernel):
  p = equation.params
  if p["dimension_numbers"] != jax.lax.conv_dimension_numbers(*(v.aval.shape for v in equation.invars), ("NHWC", "HWIO", "NHWC")):
    raise NotImplementedError("to_onnx: convolutions are written with channels last (NHWC, HWIO).")
  if any(size != 1 for size in p["lhs_dilation"]) or p["batch_group_count"] != 1:
    raise NotImplementedError("to_onnx: transposed convolutions are not written yet.")
  (top, bottom), (left, right) = p["padding"]
  out = graph.add(
    "Conv",
    [graph.transpose(x, (0, 3, 1, 2)), graph.transpose(kernel, (3, 2, 0, 1))],
    strides=list(p["window_strides"]),
    pads=[top, left, bottom, right],
    dilations=list(p["rhs_dilation"]),
    group=p["feature_group_count"],
  )
  return graph.transpose(out, (0, 2, 3, 1))


def _pool(operator: str) -> Callable:
  def pool(graph, equation, x):
    p = equation.params
    window, strides = p["window_dimensions"][1:3], p["window_strides"][1:3]
    if any(low or high for low, high in p["padding"]):
      raise NotImplementedError("to_onnx: poolings with padding are not written yet.")
    found = graph.transpose(graph.add(operator, [graph.transpose(x, (0, 3, 1, 2))], kernel_shape=list(window), strides=list(strides)), (0, 2, 3, 1))
    if operator == "AveragePool":  # JAX's is the sum
      found = graph.add("Mul", [found, graph.constant(np.float32(math.prod(window)))])
    return found

  return pool


def _product(graph, equation, x, y):
  ((left,), (right,)), (batch, _) = equation.params["dimension_numbers"]
  first, second = (variable.aval.ndim for variable in equation.invars)
  if batch or second != 2 or left != first - 1:
    raise NotImplementedError("to_onnx: products other than (…, n) times a matrix are not written yet.")
  return graph.add("MatMul", [x, y if right == 0 else graph.transpose(y, (1, 0))])


def _broadcast(graph, equation, x):
  """As a reshape where a size-1 axis will do: what follows broadcasts."""
  shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
  own = equation.invars[0].aval.shape
  if isinstance(equation.invars[0], core.Literal) or not own:
    return x
  padded = [1] * len(shape)
  for axis, size in zip(axes, own):
    padded[axis] = size
  return x if tuple(padded) == tuple(own) else graph.reshape(x, padded)


def _sum(graph, equation, x):
  if not equation.params["axes"]:  # ONNX would sum over all
    return x
  return graph.add("ReduceSum", [x, graph.constant(np.array(equation.params["axes"], np.int64))], keepdims=0)


def _convert(graph, equation, x):
  return graph.add("Cast", [x], to=graph.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"])))


def _pad(graph, equation, x, value):
  config = equation.params["padding_config"]
  if any(inside or low < 0 or high < 0 for low, high, inside in config):
    raise NotImplementedError("to_onnx: only padding at the edges is written.")
  pads = np.array([low for low, _, _ in config] + [high for _, high, _ in config], np.int64)
  return graph.add("Pad", [x, graph.constant(pads), value])


def _slice(graph, equation, x):
  p = equation.params
  whole = lambda values: graph.constant(np.array([_size(value) for value in values], np.int64))
  axes = [axis for axis, (low, high) in enumerate(zip(p["start_indices"], p["limit_indices"])) if isinstance(high, int)]
  pick = lambda values: whole([values[axis] for axis in axes])
  return graph.add("Slice", [x, pick(p["start_indices"]), pick(p["limit_indices"]), whole(axes), pick(p["strides"] or [1] * len(p["start_indices"]))])


def _power(graph, equation, x):
  return graph.add("Pow", [x, graph.constant(np.float32(equation.params["y"]))])


_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint", "custom_vjp_call_jaxpr")
_OPERATORS: dict[str, Callable[..., str]] = {
  "add": _binary("Add"),
  "add_any": _binary("Add"),
  "sub": _binary("Sub"),
  "mul": _binary("Mul"),
  "div": _binary("Div"),
  "max": _binary("Max"),
  "min": _binary("Min"),
  "gt": _binary("Greater"),
  "lt": _binary("Less"),
  "ge": _binary("GreaterOrEqual"),
  "le": _binary("LessOrEqual"),
  "exp": _unary("Exp"),
  "log": _unary("Log"),
  "tanh": _unary("Tanh"),
  "logistic": _unary("Sigmoid"),
  "neg": _unary("Neg"),
  "sqrt": _unary("Sqrt"),
  "abs": _unary("Abs"),
  "rsqrt": lambda graph, equation, x: graph.add("Reciprocal", [graph.add("Sqrt", [x])]),
  "square": lambda graph, equation, x: graph.add("Mul", [x, x]),
  "integer_pow": _power,
  "conv_general_dilated": _convolution,
  "reduce_window_max": _pool("MaxPool"),
  "reduce_window_sum": _pool("AveragePool"),
  "dot_general": _product,
  "reshape": lambda graph, equation, x, *_: graph.reshape(x, equation.outvars[0].aval.shape),
  "broadcast_in_dim": lambda graph, equation, x, *_: _broadcast(graph, equation, x),
  "squeeze": lambda graph, equation, x: graph.reshape(x, equation.outvars[0].aval.shape),
  "transpose": lambda graph, equation, x: graph.transpose(x, equation.params["permutation"]),
  "reduce_sum": _sum,
  "slice": _slice,
  "convert_element_type": _convert,
  "concatenate": lambda graph, equation, *parts: graph.add("Concat", list(parts), axis=equation.params["dimension"]),
  "pad": _pad,
  "select_n": lambda graph, equation, which, no, yes: graph.add("Where", [which, yes, no]),
  "stop_gradient": lambda graph, equation, x: x,
  "copy": lambda graph, equation, x: x,
  "name": lambda graph, equation, x: x,
}
