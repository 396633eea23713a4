"""Run transformers' own tests of models on Andromeda.

    python tests/transformers_common/run.py [--source PATH] [--without-index] [options of pytest]

The tests are those of the installed version of transformers. They belong to its source package, which pip downloads
(11 MB) together with `parameterized`, which they need; nothing is installed.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True)


def get(requirement: str, folder: Path) -> Path | None:
    """The source package of a project, downloaded into `folder`, or None if no index has it or answers."""
    try:
        pip("download", "--no-deps", "--no-binary", ":all:", "--dest", folder, requirement)
    except subprocess.CalledProcessError:
        return None
    return next(folder.glob(f"{requirement.split('==')[0]}-*"))


def unpack(archive: Path, folder: Path) -> Path:
    """The folder `tests` of a source package, unpacked below `folder`."""
    with tarfile.open(archive) as package:
        members = [member for member in package.getmembers() if "/tests/" in member.name]
        package.extractall(folder, members, filter="data")
    return next(folder.glob("*/tests"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", type=Path, help="the source package, or its folder; default: download it")
    parser.add_argument("--without-index", action="store_true", help="succeed, without a test, if no index answers")
    options, rest = parser.parse_known_args()
    version = metadata.version("transformers")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = options.source or get(f"transformers=={version}", scratch)
        try:
            pip("install", "--no-deps", "--target", scratch / "packages", "parameterized")
            reached = source is not None
        except subprocess.CalledProcessError:
            reached = False
        if not reached:
            print(f"transformers' own tests were NOT run: no index gave the source package of transformers {version}")
            return 0 if options.without_index else 1
        tests = source / "tests" if source.is_dir() else unpack(source, scratch)
        environment = os.environ | {
            "TRANSFORMERS_TESTS": str(tests),
            "PYTHONPATH": os.pathsep.join(
                filter(None, (os.environ.get("PYTHONPATH"), str(HERE), str(scratch / "packages")))
            ),
        }
        arguments = ["-p", "no:cacheprovider", str(HERE / "model_tests.py"), *rest]
        return subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
