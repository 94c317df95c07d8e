"""The exported code uses of transformers only what is listed here.

A private name, or one out of another model's code, changes without notice and breaks folders that
users have exported already. What is listed, transformers documents for models of one's own.
"""

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest

import dattn_mcore.hf
from dattn_mcore.hf import REMOTE_CODE_FILES

FOLDER = Path(dattn_mcore.hf.__path__[0])

# Importable names; a module that is not `transformers` itself holds base classes for own models.
IMPORTS = {
    "transformers": {
        "AutoConfig",
        "AutoModel",
        "BatchFeature",
        "Cache",
        "DynamicCache",
        "GenerationMixin",
        "PreTrainedConfig",
        "PreTrainedModel",
        "ProcessorMixin",
        "initialization",  # what `_init_weights` must use
    },
    "transformers.image_processing_backends": {"PilBackend"},
    "transformers.image_utils": {"PILImageResampling", "SizeDict"},
    "transformers.modeling_layers": {"GradientCheckpointingLayer"},
    "transformers.modeling_outputs": {"CausalLMOutputWithPast"},
    "transformers.processing_utils": {"ImagesKwargs"},
}
# Only where the package registers itself; exports do not hold this file.
REGISTRATION = {
    "transformers": {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoProcessor",
    },
    "transformers.models.auto.image_processing_auto": {"AutoImageProcessor"},
}
# Underscored names that a model of one's own defines or reads by transformers' documentation.
UNDERSCORED = {
    "_attn_implementation",  # of a configuration: which attention was asked for
    "_init_weights",
    "_keep_in_fp32_modules_strict",
    "_no_split_modules",
    "_preprocess",  # of an image processor
    "_skip_keys_device_placement",
    "_supports_sdpa",
    "_tied_weights_keys",
    "_version",  # of a tensor: how often it was changed in place, by PyTorch's notes on autograd
}


def parse(name):
    return ast.parse((FOLDER / name).read_text())


def imports(tree):
    """Every (module, name) that a file imports; None for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def foreign_imports(tree, allowed):
    """What a file imports of transformers and is not allowed to."""
    for module, name in imports(tree):
        if module == "transformers" and name is None:  # for __version__, see `attributes_of`
            continue
        if module.split(".")[0] == "transformers" and name not in allowed.get(module, ()):
            yield module, name


def attributes_of(tree, module):
    """Names that a file reads of a module."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == module
    }


def private(name):
    return (
        name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))
    )


def underscored(tree):
    """Private names that a file reads, sets, defines or looks up on anything."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found = node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            found = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
        elif isinstance(node, ast.FunctionDef):
            found = node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found = node.id
        else:
            continue
        if private(found):
            yield found


def own_names(trees):
    """Private names that these files define: functions, methods and module constants."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and private(node.name):
                names.add(node.name)
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names |= {t.id for t in targets if isinstance(t, ast.Name) and private(t.id)}
    return names


def defined(cls):
    """Private names in the body of a class that derives from one of transformers.

    Its source is read, since transformers keeps notes of its own on the class.
    """
    if "transformers" not in {c.__module__.split(".")[0] for c in cls.__mro__}:
        return set()
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if private(name)}


def classes():
    for name in REMOTE_CODE_FILES:
        module = importlib.import_module(f"dattn_mcore.hf.{name.removesuffix('.py')}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield value


def test_every_file_is_exported():
    assert set(REMOTE_CODE_FILES) == {file.name for file in FOLDER.glob("*_dattn.py")}


@pytest.mark.parametrize("name", REMOTE_CODE_FILES)
def test_imports_are_listed(name):
    tree = parse(name)
    assert list(foreign_imports(tree, IMPORTS)) == []
    assert attributes_of(tree, "transformers") <= {"__version__"}
    roots = {module.split(".")[0] for module, _ in imports(tree)}
    assert not roots & {"dattn_mcore", "megatron", "tools"}


def test_registration_imports_are_listed():
    assert list(foreign_imports(parse("__init__.py"), REGISTRATION)) == []


def test_what_is_listed_is_used():
    """A list that grows beyond what is needed would let anything in."""
    used = {pair for name in REMOTE_CODE_FILES for pair in imports(parse(name))}
    listed = {(module, name) for module, names in IMPORTS.items() for name in names}
    assert listed <= used
    read = {found for name in REMOTE_CODE_FILES for found in underscored(parse(name))}
    assert read >= UNDERSCORED


@pytest.mark.parametrize("name", REMOTE_CODE_FILES)
def test_underscored_names_are_ours_or_listed(name):
    ours = own_names([parse(other) for other in REMOTE_CODE_FILES])
    assert set(underscored(parse(name))) - ours <= UNDERSCORED


def test_classes_over_those_of_transformers_define_no_private_name():
    """One of ours may override, in some release, one of that name; helpers have public names."""
    found = {name for cls in classes() for name in defined(cls)}
    assert found <= UNDERSCORED
    assert {"_init_weights", "_preprocess"} <= found


def test_the_model_has_no_private_hook_of_generation():
    """The ones that this model once overrode, by name."""
    from dattn_mcore.hf import DattnForConditionalGeneration

    for name in ("_prepare_cache_for_generation", "_expand_inputs_for_generation"):
        owner = next(c for c in DattnForConditionalGeneration.__mro__ if name in vars(c))
        assert owner.__module__.startswith("transformers.")


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.models.mistral.modeling_mistral import MistralMLP",
        "from transformers.cache_utils import DynamicLayer",
        "import transformers.models.gemma2",
        "from transformers import MistralForCausalLM",
    ],
)
def test_a_foreign_import_is_seen(source):
    assert list(foreign_imports(ast.parse(source), IMPORTS))


@pytest.mark.parametrize(
    "source",
    [
        "class A(B):\n    def _reorder_cache(self): ...",
        "self._prepare_special_tokens()",
        "x = getattr(model, '_is_stateful', False)",
        "class A(B):\n    _supports_flex_attn = True",
    ],
)
def test_a_private_name_is_seen(source):
    assert set(underscored(ast.parse(source))) - UNDERSCORED
