"""A network's architecture as Python source that needs torch (and torchvision or timm, for theirs) but not
this library.

The definitions are copied from the library's own files, only those that are used, so the two cannot drift
apart.
"""

import ast
import inspect
from functools import cache, partial

from fastdynat import errors
from fastdynat.errors import UserError
from fastdynat.models import (
    build,
    conv_stem,
    external,
    preact_resnet,
    ra_resnet,
    resnet,
    small,
    wide_resnet,
)
from fastdynat.models import layer_styles as style
from fastdynat.models.build import our_network
from fastdynat.models.conv_stem import conv_stem_name
from fastdynat.user_code import is_user_supplied, short_name

MODULES = (errors, style, external, resnet, preact_resnet, small, wide_resnet, ra_resnet, conv_stem, build)
BUILD = '''
def build() -> nn.Module:
    """The network: float images (N, {channels}, {height}, {width}) in [0, 1] -> logits (N, {classes})."""
    normalize = Normalize({mean}, {std})
    return nn.Sequential(OrderedDict(normalize=normalize, net={net}))
'''


def architecture_source(
    architecture: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> str:
    """Source of a module with `build() -> nn.Module`, whose state dict has the keys of `build_model`'s."""
    channels, height, width = image_shape
    text = BUILD.strip().format(
        channels=channels,
        height=height,
        width=width,
        classes=num_classes,
        mean=mean or (0.0,) * channels,
        std=std or (1.0,) * channels,
        net=_backbone_call(architecture, num_classes, image_shape),
    )
    return _standalone(text)


def _backbone_call(architecture: str, num_classes: int, image_shape: tuple[int, int, int]) -> str:
    """The expression that makes the backbone; `build_model` chooses among the same three."""
    if is_user_supplied(architecture):
        raise UserError(
            f"{short_name(architecture)} is a network of your own, whose source this cannot write: use "
            "--format torch or "
            "onnx, or pass your file on with RUN/best/model.safetensors"
        )
    if stem := conv_stem_name(architecture):
        return f"build_conv_stem({stem!r}, num_classes={num_classes}, image_shape={image_shape})"
    if make := our_network(architecture):
        function, keywords = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
        values = {**keywords, "num_classes": num_classes, "in_channels": image_shape[0]}
        arguments = ", ".join(f"{key}={value!r}" for key, value in values.items())
        return f"{function.__name__}({arguments}, style=split_style({architecture!r})[1])"
    source, _, name = architecture.partition(":")
    function_name, name = (
        ("build_timm", name) if source.lower() == "timm" else ("build_torchvision", (name or source).lower())
    )
    return f"{function_name}({name!r}, num_classes={num_classes}, image_shape={image_shape})"


def _standalone(text: str) -> str:
    """`text` after the imports and this library's definitions that it needs, and that those need."""
    definitions, imports = _library()
    needed: set[str] = set()
    found = _names(text)
    while new := (found & definitions.keys()) - needed:
        needed |= new
        found = found.union(*(_names(definitions[name]) for name in new))
    head = sorted({line for name in found for line in imports.get(name, ())})
    return (
        "\n\n\n".join(["\n".join(head), *(definitions[name] for name in definitions if name in needed), text])
        + "\n"
    )


@cache
def _library() -> tuple[dict[str, str], dict[str, set[str]]]:
    """Top-level definitions by name, in an executable order, and import lines by the name they bind."""
    definitions: dict[str, str] = {}
    imports: dict[str, set[str]] = {}
    for module in MODULES:
        source = inspect.getsource(module)
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("fastdynat")):
                    for alias in node.names:
                        imports.setdefault(alias.asname or alias.name.partition(".")[0], set()).add(
                            _import_line(node, alias)
                        )
            elif name := _defined_name(node):
                assert name not in definitions, f"{name} is defined twice in {[m.__name__ for m in MODULES]}"
                definitions[name] = _text_of(node, source)
    return definitions, imports


def _import_line(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    one = (
        ast.Import([alias])
        if isinstance(node, ast.Import)
        else ast.ImportFrom(node.module, [alias], node.level)
    )
    return ast.unparse(one)


def _defined_name(node: ast.stmt) -> str:
    """The name that `node` defines; "" for anything but a function, a class or a constant."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = (
        node.targets[0]
        if isinstance(node, ast.Assign)
        else node.target
        if isinstance(node, ast.AnnAssign)
        else None
    )
    return target.id if isinstance(target, ast.Name) else ""


def _text_of(node: ast.stmt, source: str) -> str:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def _names(source: str) -> set[str]:
    """Every name that `source` mentions."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
