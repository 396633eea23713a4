"""The blocks of docs/transformers.md that need packages of the extra; test_transformers_page.py runs the others."""

import pytest
import test_transformers_page as page
from test_transformers_page import namespace  # noqa: F401 - a fixture

pytestmark = page.pytestmark


@pytest.mark.parametrize("code", page.WITH_PACKAGES, ids=page.name_of)
def test_python_runs_as_it_stands(code, namespace):  # noqa: F811
    page.execute(code, namespace)
