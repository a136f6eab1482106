"""The embedded model and corpus: where the installed packages put them, and proof that they are what we expect."""

import functools
import hashlib
import importlib.util
import json
import pathlib

from in2core_jax.errors import UserError

_HERE = pathlib.Path(__file__).resolve()
_OWN = _HERE.parents[2] / "third_party" / "manifest.json"
MANIFEST = _OWN if _OWN.exists() else _HERE.with_name("manifest.json")  # an installed package has a copy beside this
SETUP_HINT = "run ./run.sh setup"


def asset_path(name: str) -> pathlib.Path:
  """Path of an embedded asset, after checking every file of it against `third_party/manifest.json`.

  The packages carry data only for us: they are located, never imported (their own imports want packages that
  we do not install). A second call in the same process hashes nothing when size and time stamp have not changed.

  Args:
    name: an asset of the manifest, "smollm2-135m-instruct-q4_1" (a file) or "chatterbot-english" (a directory).

  Returns:
    The file or the directory.

  Raises:
    UserError: unknown name, package not installed, or a file that is missing, unexpected or altered.
  """
  assets = _manifest()["assets"]
  if name not in assets:
    raise UserError(f"asset {name!r} is not in {MANIFEST.name}; known: {', '.join(sorted(assets))}")
  asset = assets[name]
  if asset["kind"] == "parts":
    raise UserError(f"asset {name!r} comes in parts: read it with asset_parts")
  root = _package_dir(asset["package"], name) / asset["path"]
  _refuse_unlisted(root, asset["files"], name)
  for relative, expected in asset["files"].items():
    _check_file(root / relative if asset["kind"] == "directory" else root, expected, name)
  return root


def asset_parts(name: str) -> tuple[pathlib.Path, ...]:
  """Paths of an embedded file that comes in parts, in order, after checking each; the file is all of them in a row.

  Args:
    name: an asset of kind "parts" of the manifest, whose files are paths below the folder of installed packages, or
      of kind "file", which is one part.

  Raises:
    UserError: as `asset_path`.
  """
  asset = _manifest()["assets"].get(name, {})
  if asset.get("kind") != "parts":
    return (asset_path(name),)
  paths = []
  for relative, expected in asset["files"].items():
    package, _, inside = relative.partition("/")
    path = _package_dir(package, name) / inside
    _check_file(path, expected, name)
    paths.append(path)
  return tuple(paths)


def _manifest() -> dict:
  """The manifest as a dict."""
  try:
    return json.loads(MANIFEST.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{MANIFEST} is missing: install the package again, or clone the repository again") from None


def _package_dir(package: str, name: str) -> pathlib.Path:
  """Directory of an installed package, without importing it."""
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise UserError(f"asset {name!r} needs the Python package {package!r}, which is not installed: {SETUP_HINT}")
  return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _refuse_unlisted(root: pathlib.Path, files: dict, name: str) -> None:
  """Raises when a directory asset holds a data file that the manifest does not know: a reader would take it in."""
  if not root.is_dir():
    return
  suffixes = {pathlib.PurePath(file).suffix for file in files}
  found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.suffix in suffixes}
  unlisted = sorted(found - set(files))
  if unlisted:
    raise UserError(
      f"asset {name!r}: {root} holds files that {MANIFEST.name} does not list: {', '.join(unlisted[:5])}; "
      f"remove them, or {SETUP_HINT} in a new environment"
    )


def _check_file(path: pathlib.Path, expected: dict, name: str) -> None:
  """Raises unless the file exists with the size and SHA-256 of the manifest."""
  if not path.is_file():
    raise UserError(f"asset {name!r}: file {path} is missing: {SETUP_HINT}")
  stat = path.stat()
  digest = _sha256(path, stat.st_size, stat.st_mtime_ns) if stat.st_size == expected["bytes"] else None
  if digest != expected["sha256"]:
    seen = f"{stat.st_size} bytes" if digest is None else f"sha256 {digest[:16]}..."
    wanted = f"{expected['bytes']} bytes" if digest is None else f"sha256 {expected['sha256'][:16]}..."
    raise UserError(
      f"asset {name!r}: {path} has {seen}, but {MANIFEST.name} says {wanted}: "
      f"the file was altered or is another version; remove the environment and {SETUP_HINT}"
    )


@functools.lru_cache(maxsize=256)
def _sha256(path: pathlib.Path, size: int, mtime_ns: int) -> str:
  """SHA-256 of a file; size and time stamp are part of the cache key, so a changed file is hashed again."""
  del size, mtime_ns
  with path.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()
