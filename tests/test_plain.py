"""Plain code, where ruff has no rule for it: what a reader would have to take apart is written apart."""
import ast

import pytest
from test_layout import FILES

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def inside(node, kinds):
    """Whether a node of these kinds lies below `node`."""
    return any(isinstance(child, kinds) for child in ast.walk(node) if child is not node)


def dense(tree):
    """[(line, what is dense there)] of a syntax tree."""
    places = []
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            if len(node.generators) > 1:
                places.append((node.lineno, "a comprehension with two `for`s"))
            if inside(node, COMPREHENSIONS):
                places.append((node.lineno, "a comprehension inside a comprehension"))
        if isinstance(node, ast.IfExp) and inside(node, ast.IfExp):
            places.append((node.lineno, "a conditional expression inside another"))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) \
                and isinstance(node.targets[0], ast.Tuple):
            places.append((node.lineno, "two values assigned in one statement"))
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.IfExp, ast.BoolOp, ast.Tuple, ast.ListComp)):
            places.append((node.lineno, "an expression as a statement"))
    return places


@pytest.mark.parametrize("name", FILES)
def test_code_is_written_apart(name):
    assert not dense(ast.parse(FILES[name].read_text()))


@pytest.mark.parametrize("code", [
    "[a for b in c for a in b]", "[[a for a in b] for b in c]", "a if b else c if d else e", "a, b = c, d", "a and b()",
    "a() if b else c()"])
def test_what_is_dense_is_seen(code):
    assert dense(ast.parse(code))


@pytest.mark.parametrize("code", ["x = [a for a in b if a]", "x = a if b else c", "a, b = c", "a = b, c", "a()"])
def test_what_is_plain_passes(code):
    assert not dense(ast.parse(code))
