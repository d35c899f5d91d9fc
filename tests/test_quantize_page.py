"""docs/quantize.md works as it is written, on the model that it defines."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torchao", reason="needs torchao: pip install 'kernelpress[quantize]'")
pytest.importorskip("sklearn", reason="the digits are part of scikit-learn: pip install 'kernelpress[data]'")


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_every_snippet_of_the_page_runs(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (request.config.rootpath / "docs" / "quantize.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 5
    names: dict[str, object] = {"__name__": "page"}
    for number, snippet in enumerate(snippets):
        shorter = re.sub(r"epochs=\d+", "epochs=1", snippet)
        exec(compile(shorter, f"snippet {number} of docs/quantize.md", "exec"), names)
    kinds = {name: type(names[name]).__name__ for name in ("quantized", "better", "within", "dynamic", "qat", "again")}
    assert set(kinds.values()) == {"GraphModule"}, kinds
    assert (tmp_path / "m.pt2").exists()
