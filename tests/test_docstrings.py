"""Every public function says what goes in, what comes out and what it raises."""

import ast
import inspect
import textwrap

import pytest

import metagater_jax as mg

WINGS = ("core", "data", "nn", "optim", "federated", "personalize", "pruning", "fewshot")
PUBLIC = {f"{wing}.{name}": getattr(getattr(mg, wing), name) for wing in WINGS for name in getattr(mg, wing).__all__}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_is_whole(name):
  thing = PUBLIC[name]
  if not (inspect.isfunction(thing) or inspect.isclass(thing)):
    return  # a constant or a type
  doc = inspect.getdoc(thing)
  assert doc and doc.splitlines()[0].strip()
  if inspect.isclass(thing):
    fields = [field for field in getattr(thing, "__annotations__", {}) if field not in ("parent", "name", "head", "rowwise", "small")]
    assert all(field in doc for field in fields), fields
    return
  tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
  if inspect.signature(thing).parameters:
    assert "Args:" in doc
    arguments = doc.split("Args:")[1].split("\n\n")[0]
    assert [parameter for parameter in inspect.signature(thing).parameters if parameter not in arguments] == []
  assert "Returns:" in doc
  own = {node for inner in ast.walk(tree) if isinstance(inner, ast.FunctionDef) and inner is not tree.body[0] for node in ast.walk(inner)}
  raises = any(
    isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("check_"))
    for node in ast.walk(tree)
    if node not in own
  )
  assert not raises or "Raises:" in doc
