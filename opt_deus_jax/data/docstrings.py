"""The docstrings of installed packages: a corpus that needs no download."""

import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from opt_deus_jax.errors import UserError

STANDARD_LIBRARY = "standard library"
# What the project itself depends on, so that the corpus is there wherever the project is.
PACKAGES = (
    STANDARD_LIBRARY,
    "numpy",
    "scipy",
    "jax",
    "flax",
    "optax",
    "orbax",
    "ott",
    "grain",
    "chex",
    "absl",
    "etils",
    "equinox",
    "lineax",
    "jaxopt",
    "jaxtyping",
    "matplotlib",
    "ml_collections",
    "tensorstore",
    "huggingface_hub",
    "fsspec",
    "pyarrow",
    "rich",
    "tqdm",
    "jinja2",
    "yaml",
    "PIL",
)
MIN_CHARACTERS = 200
_SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "site-packages",
        "dist-packages",
        "_vendor",
        "vendor",
        "vendored",
        "_vendored",
        "externals",
        "__pycache__",
    }
)
_SKIPPED_FILES = re.compile(r"test_.*|.*_test|conftest")
_BLANK_LINES = re.compile(r"\n\s*\n")


def read_docstrings(packages: Sequence[str] = PACKAGES) -> Iterator[tuple[str, str]]:
    """Streams the docstrings of installed packages, one document a module.

    Source files are parsed, never imported. Of docstrings that share most of their paragraphs
    only the first is kept, so modules split into training and held-out text do not overlap.
    Modules come in a fixed random order, so the first ones are a sample of all packages.

    Args:
        packages: Top-level packages; those that are not installed are left out.

    Yields:
        The dotted name of the module, and its docstrings under their qualified names.

    Raises:
        UserError: None of the packages is installed as source.
    """
    seen: set[bytes] = set()
    for name, path in tqdm(
        _modules(packages), "docstrings", unit="module", leave=False, disable=None
    ):
        parts = [f"{title}\n\n{text}" for title, text in _parse(name, path) if _is_new(text, seen)]
        document = "\n\n\n".join(parts)
        if len(document) >= MIN_CHARACTERS:
            yield name, document


def fingerprint(packages: Sequence[str] = PACKAGES) -> str:
    """Hashes the source files that `read_docstrings` reads.

    Args:
        packages: As there.

    Returns:
        Hexadecimal sha256 of their names and contents.

    Raises:
        UserError: None of the packages is installed as source.
    """
    digest = hashlib.sha256()
    for name, path in _modules(packages):
        # Packages may hold links that lead nowhere; such a module has no docstrings either.
        content = path.read_bytes() if path.exists() else b""
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _modules(packages: Sequence[str]) -> list[tuple[str, Path]]:
    modules = [module for package in packages for module in _find_modules(package)]
    if not modules:
        raise UserError(
            f"docstrings: no Python source of {', '.join(packages)} is installed: name files of"
            " text by --config.data.train=FILES"
        )
    return sorted(modules, key=lambda module: hashlib.sha1(module[0].encode()).digest())


def _find_modules(package: str) -> list[tuple[str, Path]]:
    if package == STANDARD_LIBRARY:
        roots, prefix = [sysconfig.get_path("stdlib")], ()
    else:
        # For a top-level name this looks the package up without running any of its code.
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or []) if spec else []
        prefix = (package,)
    modules = []
    for root in map(Path, roots):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if _SKIPPED_FOLDERS.isdisjoint(parts) and not _SKIPPED_FILES.fullmatch(parts[-1]):
                names = prefix + (parts[:-1] if parts[-1] == "__init__" else parts)
                modules.append((".".join(names), path))
    return modules


def _parse(module: str, path: Path) -> list[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            # Other people's invalid escape sequences are no concern of ours.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        # Packages ship templates and files for other Python versions under the same ending.
        return []
    found: list[tuple[str, str]] = []
    _collect(tree, module, found)
    return found


def _collect(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    name: str,
    found: list[tuple[str, str]],
) -> None:
    docstring = ast.get_docstring(node, clean=False)
    if docstring and docstring.strip():
        found.append((name, inspect.cleandoc(docstring)))
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _collect(child, f"{name}.{child.name}", found)


def _is_new(text: str, seen: set[bytes]) -> bool:
    """Says whether less than half of a docstring was seen before, and remembers it."""
    paragraphs = [" ".join(part.lower().split()) for part in _BLANK_LINES.split(text)]
    keys = [hashlib.sha1(part.encode("utf-8", "replace")).digest() for part in paragraphs]
    old = sum(len(part) for part, key in zip(paragraphs, keys, strict=True) if key in seen)
    seen.update(keys)
    return 2 * old < sum(map(len, paragraphs))
