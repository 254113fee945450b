import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index, name in enumerate(("abc", "argparse", "ast", "base64", "bisect")):
        source = Path(sys.modules["os"].__file__).parent / f"{name}.py"
        (folder / f"{index}.txt").write_text(source.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return folder
